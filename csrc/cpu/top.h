// The largest few of a row, equal values in order of their index.
#pragma once

struct Best {
    float value;
    int64_t index;
};

// Puts (value, index) into a descending list of at most `room`; what is already there wins ties.
static inline void insert(Best* list, int64_t& count, int64_t room, float value, int64_t index) {
    int64_t at = count < room ? count++ : room - 1;
    for (; at > 0 && value > list[at - 1].value; --at) list[at] = list[at - 1];
    list[at] = {value, index};
}

static void sift_down(uint64_t* keys, int64_t at, int64_t n) {
    for (int64_t child; (child = 2 * at + 1) < n; at = child) {
        if (child + 1 < n && keys[child + 1] < keys[child]) ++child;
        if (keys[at] <= keys[child]) return;
        const uint64_t swap = keys[at];
        keys[at] = keys[child];
        keys[child] = swap;
    }
}

// Many: the first `want` of all n in order, by a heap over keys (value, then low index).
static void top_by_heap(const float* s, int64_t n, int64_t want, Best* list) {
    uint64_t* keys = reinterpret_cast<uint64_t*>(scratch(5, 2 * n));
    for (int64_t i = 0; i < n; ++i) {
        const float value = s[i] + 0.0f;  // -0 becomes 0: they are equal
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;  // ordered like the floats
        keys[i] = ~((static_cast<uint64_t>(bits) << 32) | static_cast<uint32_t>(~i));
    }
    for (int64_t at = n / 2 - 1; at >= 0; --at) sift_down(keys, at, n);
    for (int64_t j = 0; j < want; ++j) {
        const int64_t index = static_cast<uint32_t>(keys[0]);
        list[j] = {s[index], index};
        keys[0] = keys[n - 1 - j];
        sift_down(keys, 0, n - 1 - j);
    }
}

// The `want` largest of s[0:n], want <= n. `lowest` receives the smallest of all.
//
// Two passes: the maxima of 2 W interleaved classes each give a bound that at least `want` values
// reach; the second pass looks only at those.
static void top_of(const float* s, int64_t n, int64_t want, Best* list, float* lowest) {
    vf high[2] = {all(-INFINITY), all(-INFINITY)}, low = all(INFINITY);
    int64_t i = 0;
    for (; i + 2 * W <= n; i += 2 * W) {
        const vf a = load(s + i), b = load(s + i + W);
        high[0] = larger(high[0], a);
        high[1] = larger(high[1], b);
        low = smaller(low, smaller(a, b));
    }
    float maxima[2 * W];
    store(maxima, high[0]);
    store(maxima + W, high[1]);
    float least = smallest(low);
    for (int64_t j = i; j < n; ++j) {
        maxima[j - i] = s[j] > maxima[j - i] ? s[j] : maxima[j - i];
        least = s[j] < least ? s[j] : least;
    }
    *lowest = least;
    const int64_t groups = n < 2 * W ? n : 2 * W;
    if (want > groups || want > 16) {
        top_by_heap(s, n, want, list);
        return;
    }
    int64_t count = 0;
    for (int64_t j = 0; j < groups; ++j)
        if (count < want || maxima[j] > list[count - 1].value) insert(list, count, want, maxima[j], 0);
    const float bound = list[want - 1].value;

    count = 0;
    int64_t k = 0;
    for (; k + W <= n; k += W)
        for (uint32_t bits = at_least(load(s + k), all(bound)); bits != 0; bits &= bits - 1) {
            const int64_t index = k + __builtin_ctz(bits);
            if (count < want || s[index] > list[count - 1].value)
                insert(list, count, want, s[index], index);
        }
    for (; k < n; ++k)
        if (s[k] >= bound && (count < want || s[k] > list[count - 1].value))
            insert(list, count, want, s[k], k);
}
