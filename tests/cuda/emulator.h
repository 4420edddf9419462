// A block of CUDA threads on the host, so that the kernels themselves run where there is no GPU.
//
// Each thread is a fiber; it runs until it has to wait for its warp (a shuffle, a vote) or its
// block, then the next one runs. A barrier that not all threads reach ends the test with an error,
// as does a shuffle in which lanes are missing. Blocks run one after the other.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#undef __shared__
#undef __global__
#undef __device__
#undef __forceinline__
#undef __noinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __shared__ static
#define __global__
#define __device__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__

namespace emulator {

struct Dim {
    unsigned x;
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    int waits;  // 0: runs, 1: for its warp, 2: for its block, 3: ended
};

struct Warp {
    unsigned char slots[2][32][16];  // what lanes show each other, of this exchange and the next
};

constexpr size_t STACK = 128 * 1024;
inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline std::vector<int> turn;  // of each thread: which of the two slots
inline ucontext_t scheduler;
inline std::function<void()> kernel;
inline unsigned current;
inline bool failed;

inline void wait(int what) {
    fibers[current].waits = what;
    swapcontext(&fibers[current].context, &scheduler);
}

inline void run_fiber() {
    kernel();
    fibers[current].waits = 3;
    swapcontext(&fibers[current].context, &scheduler);
}

// Threads first..last that all wait for the same go on; 0 if one does not.
inline bool release(unsigned first, unsigned last, int what) {
    for (unsigned i = first; i < last; ++i)
        if (fibers[i].waits != what) return false;
    for (unsigned i = first; i < last; ++i) fibers[i].waits = 0;
    return true;
}

template <class F>
bool run_block(unsigned threads, Dim& thread, const F& body) {
    kernel = body;
    failed = false;
    fibers = std::vector<Fiber>(threads);
    warps = std::vector<Warp>(threads / 32);
    turn.assign(threads, 0);
    for (unsigned i = 0; i < threads; ++i) {
        Fiber& f = fibers[i];
        f.stack.reset(new char[STACK]);
        f.waits = 0;
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.get();
        f.context.uc_stack.ss_size = STACK;
        f.context.uc_link = &scheduler;
        makecontext(&f.context, run_fiber, 0);
    }
    for (;;) {
        bool any = false;
        for (unsigned i = threads; i-- > 0;) {  // backwards: an order that hides no missing barrier
            if (fibers[i].waits != 0) continue;
            any = true;
            current = i;
            thread.x = i;
            swapcontext(&scheduler, &fibers[i].context);
        }
        bool released = false;
        for (unsigned w = 0; w < threads; w += 32) released |= release(w, w + 32, 1);
        released |= release(0, threads, 2);
        if (!any && !released) break;
    }
    for (const Fiber& f : fibers) failed |= f.waits != 3;
    return !failed;
}

}  // namespace emulator

inline emulator::Dim threadIdx, blockIdx, blockDim;

inline void __syncthreads() { emulator::wait(2); }

// A value of another lane; the exchange after this one uses other slots, so one wait is enough.
template <class T>
T exchanged(T value, unsigned from) {
    const unsigned self = emulator::current;
    emulator::Warp& warp = emulator::warps[self / 32];
    const int slot = emulator::turn[self] ^= 1;
    std::memcpy(warp.slots[slot][self % 32], &value, sizeof(T));
    emulator::wait(1);
    T out;
    std::memcpy(&out, warp.slots[slot][from < 32 ? from : self % 32], sizeof(T));
    return out;
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int o) {
    return exchanged(value, (emulator::current % 32) ^ static_cast<unsigned>(o));
}

template <class T>
T __shfl_down_sync(unsigned, T value, int o) {
    return exchanged(value, emulator::current % 32 + static_cast<unsigned>(o));
}

inline bool __any_sync(unsigned mask, bool x) {
    int found = x;
    for (int o = 16; o > 0; o /= 2) found |= __shfl_xor_sync(mask, found, o);
    return found != 0;
}
