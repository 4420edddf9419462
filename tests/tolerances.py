"""Every tolerance of the test suite, with its reason and where it was seen."""

# Reference scores in float32 against float64 given the same float32 cosines. Worst seen over
# taus .01 and 1, K up to 1000: 1.5e-6 (delta_energy, tau = 1); the rest stays below 5e-7.
SCORE_RTOL = 5e-6

# The same with features in: float32 cosines err by about 1e-7 absolute, tau = .01 makes that 1e-5
# of a logit and so 1e-5 of whatever is exponential in it.
SCORE_FROM_FEATURES_RTOL = 1e-4

# Features of tiny untrained towers (norm about 4) in float32 against numpy float64 over two
# blocks. Worst seen: 3.3e-6 (x86-64 CPU).
FEATURE_ATOL = 2e-5

# Gradients by the fused kernels against float64 autograd of the reference, relative to the largest
# element. Float32 cosines divided by tau = .01 leave 1e-5; worst seen 1.1e-5 (x86-64 CPU).
GRADIENT_RTOL = 5e-5

# The same for patches: the gradients of a row's logits sum to 0, and CLIP's classes share a
# direction, so what is left is small. Worst seen at tau = 1: 1.1e-4; eager float32 has 1.4e-4.
PATCH_GRADIENT_RTOL = 5e-4

# What fused row scores may err more than eager float32 where that is lucky: they sum in float
# lanes, up to 128 numbers each at SSE width. Worst seen: 9e-7 (2,000 classes of 4 values);
# CLIP-like: 2e-7.
SCORE_BESIDE_EAGER_RTOL = 1e-6

# Rows a Triton kernel divides by their norms against float64, besides the rounding to the operand's
# type: a float32 sum of squares, a root, a quotient and a product. Worst seen: 1.8e-7 (D = 300).
TRITON_NORM_RTOL = 5e-7

# Cosines by tiles of a Triton kernel against float64 products of the rounded rows: a float32 sum
# over D, and a norm. Worst seen: 3.9e-7 (fp16, D = 300).
TRITON_COSINE_ATOL = 1e-6

# Entropy and variance of similarities at tau = 100, where softmax is all but flat: their sums are
# of float32 numbers whose squares remain. Worst seen by the CUDA kernels: 1.3e-5; eager float32
# keeps no digit.
FLAT_MOMENTS_RTOL = 5e-5

# Weights without their weakest singular directions against a float64 SVD, Frobenius norm relative
# to the weights'. Worst seen: 3e-8, the rounding of the result to float32 (x86-64 CPU).
LOW_RANK_RTOL = 1e-5

# The same for float64 weights: singular vectors off by rounding over the distance to neighbours.
# Worst seen: 1.4e-13 (x86-64 CPU).
LOW_RANK64_RTOL = 1e-12

# What is left plus the factors of what was dropped, relative to the weights: the rounding of what
# is left to float32. Worst seen: 2.6e-8.
LOW_RANK_REST_RTOL = 1e-7

# Scalar products of singular vectors in float64. Worst seen: 2e-15.
ORTHONORMAL64_ATOL = 1e-13

# How much the errors of a few rows by a GPU kernel may exceed those of eager rows rounded to the
# same numbers: the roundings differ, and the largest of a dozen may be small by luck. Worst seen:
# 1.2 (bfloat16, 12 images).
ROUNDING_LUCK = 2.0

# NegLabel's Triton kernels however their columns are cut: the same float32 cosines, sums relative
# to another tile's largest. Worst seen: 3e-7.
GROUPED_CUT_RTOL = 1e-6

# Losses along 20 SGD steps by shared-prefix text and fused losses against the plain algorithms
# with full text passes; the figures demanded. Worst seen on the tiny CLIP: 5e-7 and 5e-15, losses
# of 0 to 4.
TRAJECTORY_LOSS_ATOL = 1e-4
TRAJECTORY_LOSS64_ATOL = 1e-9

# Parameters of order 1 trained by two processes and by one: sums of float32 in another order,
# over tens of steps. Worst seen: see tests/tuning/test_loop.py, 1.2e-7 (x86-64 CPU).
TWO_PROCESSES_ATOL = 1e-6

# Text features and gradients of prompts by the shared-prefix pass against the full pass, relative
# to the largest number: two orders of summation. Worst seen: 2e-14 in float64, 2e-6 in float32
# against float64 (gradients of two layers; x86-64 CPU).
PROMPT_F64_RTOL = 1e-12
PROMPT_RTOL = 1e-5

# Features of tiny towers (norm about 6) with low-rank updates merged against the same attached: the
# same weights, and room for fused attention, which only frozen weights may take. Worst seen: 0.
LORA_MERGED_ATOL = 1e-6

# How much larger than the full pass's the errors of prompts in half precision may be: a few random
# numbers, rounded at other places. Worst seen: 1.1 (bfloat16, 8 context tokens).
PROMPT_HALF_LUCK = 1.5
# The same, relative, for losses and larger parameters behind a text tower.
TWO_PROCESSES_RTOL = 1e-6

# Loss and cosines of the tiny CLIP with its text tower in bfloat16 (8 bits), or under autocast,
# beside float32. Worst seen: 9e-4 of losses around .3, 1.3e-3 of cosines (x86-64 CPU).
BF16_TOWER_LOSS_ATOL = 5e-3
BF16_TOWER_COSINE_ATOL = 5e-3

# What weights without some directions make of activations, by tails against the weights
# themselves, relative to the largest number. Worst seen: 8e-16 and 2.5e-7 (40 x 24, x86-64 CPU).
TAILS_F64_RTOL = 1e-12
TAILS_RTOL = 1e-5

# Logits (up to 5) of tiny classifiers by their head on features beside the model's own: the same
# float32 product again. Worst seen: 0 (x86-64 CPU); room for other ways to sum it.
CLASSIFIER_LOGITS_ATOL = 1e-5

# The objective of a SeTAR search against its definition, of order 1: sums in another order, and in
# float32 the rounding of logits. Worst seen: 4e-16 and 2e-7 (x86-64 CPU).
OBJECTIVE_F64_RTOL = 1e-12
OBJECTIVE_RTOL = 2e-6

# Features of towers run block by block with candidates' weights against models that have those
# weights, relative to the largest number. Worst seen: 2.3e-15 and 8e-7 (3 layers, x86-64 CPU).
TOWER_F64_RTOL = 1e-10
TOWER_RTOL = 2e-5

# The same in float64 beside Hugging Face's "eager" attention, which takes its softmax in float32.
# Worst seen: 4e-8 (3 layers, x86-64 CPU).
TOWER_EAGER_RTOL = 1e-6

# Objectives of a search's candidates (losses of order 1) from kept prefixes and nested tails beside
# whole passes of models whose weights were replaced, float64 tiny towers.
SEARCH_F64_RTOL = 1e-9

# Features of tiny Swins by parts against the plain models with candidates' weights, float64,
# relative to the largest. Worst seen: 3.4e-15 (x86-64 CPU).
SWIN_F64_RTOL = 1e-12

# Entropy terms of patches, sums of up to 12, of float32 logits of order 20 against float64. Worst
# seen: 1.03e-5 (40,000 classes without vector instructions), 4e-6 up to 5,000 (x86-64 CPU).
PATCH_TERMS_ATOL = 2e-5

# Features of a tiny image tower whose weights lost directions, by two thin layers and by one dense
# one, float32, relative to their norm: products in another order. Worst seen: 5e-7 (x86-64 CPU).
FACTORED_RTOL = 1e-5

# Scores of the tiny model's features on a GPU, logits of order 10, float32. One of pretence works
# on the CPU in another order: worst seen 1.5e-6 (x86-64). On a real one patches are embedded by a
# convolution, which cuDNN rounds to TF32 unless told otherwise; not seen yet.
PRETENDED_GPU_ATOL = 2e-5
REAL_GPU_ATOL = 2e-2
