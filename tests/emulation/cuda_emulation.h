// As much of CUDA as our kernels use, on one CPU thread: every CUDA thread is a fiber that runs until it meets a barrier.
//
// It is stricter than a GPU: shared memory starts as NaN, writing past the bytes asked for is an error, and so is a barrier
// that some threads of the block never reach. Running the fibers in reverse order must give the same bits; where a barrier
// is missing, one of the two orders reads a value too early.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <setjmp.h>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <ucontext.h>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

using std::max;
using std::min;

struct float4 {
    float x, y, z, w;
};
struct Dim3 {
    unsigned x, y, z;
};

inline Dim3 threadIdx, blockIdx, blockDim, gridDim;

constexpr size_t kSharedLimit = 232448, kGuard = 4096;
alignas(16) float4 shared_memory[(kSharedLimit + kGuard) / sizeof(float4)];

namespace emulation {

constexpr size_t kStack = 256 * 1024;
enum class State { ready, at_block_barrier, at_warp_barrier, done };

// ucontext only starts a fiber; switching by _setjmp and _longjmp saves the two system calls of swapcontext.
struct Fiber {
    ucontext_t start;
    jmp_buf resume;
    bool started = false;
    std::unique_ptr<char[]> stack{new char[kStack]};
    State state = State::done;
};

struct Block {
    std::vector<std::unique_ptr<Fiber>> fibers;
    jmp_buf scheduler;
    unsigned current = 0, size = 0;
    void (*body)(void*) = nullptr;
    void* argument = nullptr;
    double exchange[1024];
};
inline Block block;

inline void pause(State why) {
    Fiber& self = *block.fibers[block.current];
    self.state = why;
    if (_setjmp(self.resume) == 0) _longjmp(block.scheduler, 1);
}

inline void enter() {
    block.body(block.argument);
    pause(State::done);
}

inline void run_fiber(Fiber& fiber) {
    if (_setjmp(block.scheduler) != 0) return;
    if (fiber.started) _longjmp(fiber.resume, 1);
    fiber.started = true;
    setcontext(&fiber.start);
}

// Lets go the groups of fibers (a warp, or the block) that have all arrived; true when anything could go on.
inline bool release(State barrier, unsigned group) {
    bool any = false;
    for (unsigned first = 0; first < block.size; first += group) {
        const unsigned last = min(block.size, first + group);
        bool all = true;
        for (unsigned i = first; i < last; ++i) all = all && block.fibers[i]->state == barrier;
        if (!all) continue;
        for (unsigned i = first; i < last; ++i) block.fibers[i]->state = State::ready;
        any = true;
    }
    return any;
}

inline void run_block(bool reverse) {
    for (unsigned i = 0; i < block.size; ++i) {
        if (block.fibers.size() <= i) block.fibers.push_back(std::make_unique<Fiber>());
        Fiber& fiber = *block.fibers[i];
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = fiber.stack.get();
        fiber.start.uc_stack.ss_size = kStack;
        fiber.start.uc_link = nullptr;
        makecontext(&fiber.start, enter, 0);
        fiber.state = State::ready;
        fiber.started = false;
    }
    for (;;) {
        unsigned done = 0;
        for (unsigned i = 0; i < block.size; ++i) {
            block.current = reverse ? block.size - 1 - i : i;
            Fiber& fiber = *block.fibers[block.current];
            threadIdx = {block.current, 0, 0};
            if (fiber.state == State::ready) run_fiber(fiber);
            done += fiber.state == State::done;
        }
        if (done == block.size) return;
        const bool warps = release(State::at_warp_barrier, 32);
        if (!release(State::at_block_barrier, block.size) && !warps)
            throw std::runtime_error("block " + std::to_string(blockIdx.x) + ": some threads wait at a barrier that others never reach");
    }
}

inline void launch(unsigned grid, unsigned threads, unsigned shared_bytes, bool reverse) {
    if (threads == 0 || threads > 1024 || grid == 0) throw std::runtime_error("impossible launch");
    if (shared_bytes > kSharedLimit) throw std::runtime_error("more shared memory than any GPU has");
    gridDim = {grid, 1, 1};
    blockDim = {threads, 1, 1};
    block.size = threads;
    for (unsigned b = 0; b < grid; ++b) {
        blockIdx = {b, 0, 0};
        std::memset(shared_memory, 0xff, shared_bytes + kGuard);  // 0xffffffff is a NaN
        run_block(reverse);
        for (size_t i = shared_bytes; i < shared_bytes + kGuard; ++i)
            if (reinterpret_cast<unsigned char*>(shared_memory)[i] != 0xff) throw std::runtime_error("a write past the end of shared memory");
    }
}

template <class T>
T from_lane(T value, unsigned lane) {
    const unsigned self = block.current, warp = self / 32 * 32;
    block.exchange[self] = (double)value;
    pause(State::at_warp_barrier);
    const T result = (T)block.exchange[warp + (lane < 32 ? lane : self % 32)];
    pause(State::at_warp_barrier);
    return result;
}

template <class... P, size_t... I>
void call(void (*kernel)(P...), void** args, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_reference_t<P>*>(args[I])...);
}

// `kinds` holds a letter for each argument that the host sends: p(ointer), i(nt), f(loat).
template <class... P>
void run(void (*kernel)(P...), const char* kinds, unsigned grid, unsigned threads, unsigned shared_bytes, void** args, bool reverse) {
    std::string wanted;
    ((wanted += std::is_pointer_v<P> ? 'p' : std::is_same_v<P, int> ? 'i' : std::is_same_v<P, float> ? 'f' : '?'), ...);
    if (wanted != kinds) throw std::runtime_error("the kernel takes " + wanted + ", the host sends " + kinds);
    auto body = [&] { call(kernel, args, std::index_sequence_for<P...>{}); };
    block.body = [](void* it) { (*static_cast<decltype(body)*>(it))(); };
    block.argument = &body;
    launch(grid, threads, shared_bytes, reverse);
}

}  // namespace emulation

inline void __syncthreads() { emulation::pause(emulation::State::at_block_barrier); }

template <class T>
T __shfl_down_sync(unsigned, T value, unsigned step) {
    return emulation::from_lane(value, threadIdx.x % 32 + step);
}

template <class T>
T __shfl_sync(unsigned, T value, unsigned lane) {
    return emulation::from_lane(value, lane % 32);
}

inline void __syncwarp() { emulation::pause(emulation::State::at_warp_barrier); }

inline unsigned __ballot_sync(unsigned, bool predicate) {
    unsigned bits = 0;
    const unsigned self = emulation::block.current, warp = self / 32 * 32;
    emulation::block.exchange[self] = predicate;
    emulation::pause(emulation::State::at_warp_barrier);
    for (unsigned lane = 0; lane < 32; ++lane) bits |= (emulation::block.exchange[warp + lane] != 0 ? 1u : 0u) << lane;
    emulation::pause(emulation::State::at_warp_barrier);
    return bits;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(unsigned bits) { return __builtin_ffs((int)bits); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float atomicAdd(float* at, float value) {
    const float before = *at;
    *at += value;
    return before;
}
