// CUDA on the CPU, for tests: as much of the language as the kernels of csrc use.
//
// A CUDA thread is a fiber. Fibers run one at a time, each until it waits for others, a warp as far
// as it gets alone; a few blocks of a launch are under way at a time. In which order all that goes
// is up to shim::order, and so is the moment an asynchronous copy takes place: results must not
// depend on either.
//
// Errors show like this: what no thread wrote in shared memory is NaN; a barrier that some threads
// never reach, and a warp whose lanes meet at different instructions, end the launch; each barrier
// and wait can be switched off by its place in the source, and a test must then turn red.
//
// Not modelled: memory order (__threadfence does nothing), wgmma, TMA, clusters.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#include "fiber.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)
#define __restrict__ __restrict

struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct int2 {
    int x, y;
};
struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline float2 make_float2(float x, float y) {
    return {x, y};
}
inline float4 make_float4(float x, float y, float z, float w) {
    return {x, y, z, w};
}
inline int2 make_int2(int x, int y) {
    return {x, y};
}
inline uint2 make_uint2(unsigned x, unsigned y) {
    return {x, y};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
    return {x, y, z, w};
}

inline uint3 threadIdx, blockIdx;  // of the fiber that runs
inline dim3 blockDim, gridDim;

namespace shim {

constexpr size_t kMaxSharedBytes =
    99 * 1024;  // what every GPU we compile for has: sm_120 has least

// How a launch runs. order 0: threads in order, one block after another; 1: backwards, else:
// shuffled by this seed, and several blocks at a time. early_copies: a copy takes place at once;
// else not before its thread waits for it.
inline int order = 0;
inline bool early_copies = false;

// Barriers and waits met so far, as "file:line", and the one that does nothing.
struct Place {
    const char* file;
    int line;
    std::string name;
};
inline std::vector<Place> places;
inline std::string disabled;

inline bool is_disabled(const char* file, int line) {
    for (const Place& place : places) {
        if (place.line == line && place.file == file) {
            return place.name == disabled;
        }
    }
    const char* base = std::strrchr(file, '/');
    const std::string name = std::string(base ? base + 1 : file) + ":" + std::to_string(line);
    places.push_back({file, line, name});
    return name == disabled;
}

struct Copy {
    void* to;
    const void* from;  // null: zeros
    int group;
};

enum class State { kReady, kAtBlockBarrier, kInWarp, kDone };

struct Thread {
    Fiber fiber;
    State state;
    std::vector<Copy> copies;
    int open_group;
};

using Operation = void (*)(void* const (&lanes)[32]);

struct Warp {
    void* lanes[32];  // what each lane brought to the operation
    unsigned arrived;
    Operation operation;
};

struct Block {
    unsigned index;
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    std::vector<unsigned char> storage;
    unsigned char* shared;
};

constexpr size_t kResidentBlocks = 3;
inline std::vector<std::unique_ptr<Block>> pool;  // kept between launches, for the stacks
inline Block* block = nullptr;                    // whose thread runs
inline int current = 0;                           // that thread
inline std::string failure;                       // ends the launch
inline std::function<void()> body;

inline Thread& self() {
    return block->threads[current];
}
inline void leave() {
    self().fiber.leave();
}

inline void fail(const std::string& message) {
    failure = message + " (block " + std::to_string(block->index) + ", thread " +
              std::to_string(current) + ")";
    leave();
    std::abort();  // a failed launch resumes nobody
}

inline int lane() {
    return current % 32;
}

// Every lane of a warp brings `mine`; the last to arrive runs the operation for all.
template <class Mine>
void together(Mine& mine, Operation operation) {
    Warp& warp = block->warps[current / 32];
    if (warp.arrived == 0) {
        warp.operation = operation;
    } else if (warp.operation != operation) {
        fail("lanes of a warp are at different instructions");
    }
    warp.lanes[lane()] = &mine;
    warp.arrived |= 1u << lane();
    if (warp.arrived == ~0u) {
        warp.arrived = 0;
        operation(warp.lanes);
        for (int i = current / 32 * 32; i < current / 32 * 32 + 32; ++i) {
            block->threads[i].state = State::kReady;
        }
    } else {
        self().state = State::kInWarp;
        leave();
    }
}

inline void perform(const Copy& copy) {
    if (copy.from == nullptr) {
        std::memset(copy.to, 0, 16);
    } else {
        std::memcpy(copy.to, copy.from, 16);
    }
}

inline void start_copy(void* to, const void* from) {
    if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) {
        fail("an asynchronous copy between addresses that do not divide by 16");
    }
    const Copy copy{to, from, self().open_group};
    if (early_copies) {
        perform(copy);
    } else {
        self().copies.push_back(copy);
    }
}

inline void finish_copies(int newest) {
    Thread& thread = self();
    std::vector<Copy> rest;
    for (const Copy& copy : thread.copies) {
        if (copy.group < thread.open_group - newest) {
            perform(copy);
        } else {
            rest.push_back(copy);
        }
    }
    thread.copies = rest;
}

inline void enter() {
    body();
    self().state = State::kDone;
    leave();
    std::abort();
}

// 0 .. n-1 as shim::order has it.
inline std::vector<int> ordered(int n, std::mt19937& random) {
    std::vector<int> numbers(n);
    for (int i = 0; i < n; ++i) {
        numbers[i] = order == 1 ? n - 1 - i : i;
    }
    if (order > 1) {
        std::shuffle(numbers.begin(), numbers.end(), random);
    }
    return numbers;
}

inline void start(Block& fresh, unsigned index, unsigned num_threads, size_t shared_bytes) {
    fresh.index = index;
    if (fresh.threads.size() != num_threads) {
        fresh.threads = std::vector<Thread>(num_threads);
    }
    fresh.warps.assign(num_threads / 32, Warp{});
    for (Thread& thread : fresh.threads) {
        thread.fiber.start(enter);
        thread.state = State::kReady;
        thread.copies.clear();
        thread.open_group = 0;
    }
    fresh.storage = std::vector<unsigned char>(shared_bytes + 256);
    fresh.shared = fresh.storage.data() + 128;
    fresh.shared -= reinterpret_cast<uintptr_t>(fresh.storage.data()) % 128;
    std::memset(fresh.shared, 0xFF, shared_bytes);  // NaN in every type
#ifdef __SANITIZE_ADDRESS__
    __asan_poison_memory_region(fresh.shared + shared_bytes, 128);
#endif
}

// Resume each lane that is ready; false if there is none.
inline bool run_warp(int warp, std::mt19937& random) {
    bool ran = false;
    for (int lane : ordered(32, random)) {
        current = warp * 32 + lane;
        if (self().state == State::kReady) {
            ran = true;
            threadIdx = uint3{static_cast<unsigned>(current), 0, 0};
            blockIdx = uint3{block->index, 0, 0};
            self().fiber.resume();
            if (!failure.empty()) {
                throw std::runtime_error(failure);
            }
        }
    }
    return ran;
}

// Run one warp of `block` as far as it gets alone, or open the barrier; false when all is done.
inline bool go_on(std::mt19937& random) {
    for (int warp : ordered(static_cast<int>(block->warps.size()), random)) {
        bool ran = false;
        while (run_warp(warp, random)) {
            ran = true;
        }
        if (ran) {
            return true;
        }
    }
    size_t waiting = 0, done = 0;
    for (const Thread& thread : block->threads) {
        waiting += thread.state == State::kAtBlockBarrier;
        done += thread.state == State::kDone;
    }
    if (done == block->threads.size()) {
        return false;
    }
    if (waiting + done < block->threads.size()) {
        throw std::runtime_error("deadlock: some threads never reach what others wait for");
    }
    for (Thread& thread : block->threads) {
        if (thread.state == State::kAtBlockBarrier) {
            thread.state = State::kReady;
        }
    }
    return true;
}

template <class Body>
void launch(unsigned num_blocks, unsigned num_threads, size_t shared_bytes, Body run) {
    if (num_blocks == 0 || num_threads == 0 || num_threads > 1024 || num_threads % 32 ||
        shared_bytes > kMaxSharedBytes) {
        throw std::runtime_error("invalid configuration of a launch");
    }
    std::mt19937 random(order);
    body = run;
    failure.clear();
    gridDim = dim3(num_blocks);
    blockDim = dim3(num_threads);
    pool.resize(kResidentBlocks);
    std::vector<int> waiting = ordered(static_cast<int>(num_blocks), random);
    std::reverse(waiting.begin(), waiting.end());  // the next one is at the back
    std::vector<Block*> resident(order == 0 ? 1 : kResidentBlocks, nullptr);
    while (true) {
        bool any = false;
        for (int slot : ordered(static_cast<int>(resident.size()), random)) {
            if (resident[slot] == nullptr && !waiting.empty()) {
                if (!pool[slot]) {
                    pool[slot] = std::make_unique<Block>();
                }
                resident[slot] = pool[slot].get();
                start(*resident[slot], waiting.back(), num_threads, shared_bytes);
                waiting.pop_back();
            }
            block = resident[slot];
            if (block != nullptr) {
                any = true;
                // A block may get far ahead of another from any point on.
                for (int steps = order > 1 ? 1 << random() % 6 : 1; steps > 0; --steps) {
                    if (!go_on(random)) {
                        resident[slot] = nullptr;
                        break;
                    }
                }
            }
        }
        if (!any) {
            return;
        }
    }
}

template <class T>
T from_lane(T mine, int source) {
    struct Exchange {
        T value;
        int source;
        T result;
    } exchange{mine, source & 31, {}};
    together(exchange, [](void* const(&lanes)[32]) {
        for (void* lane : lanes) {
            auto* own = static_cast<Exchange*>(lane);
            own->result = static_cast<Exchange*>(lanes[own->source])->value;
        }
    });
    return exchange.result;
}

inline void check_mask(unsigned mask) {
    if (mask != ~0u) {
        fail("only whole warps may exchange values");
    }
}

}  // namespace shim

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    if (!shim::is_disabled(file, line)) {
        shim::self().state = shim::State::kAtBlockBarrier;
        shim::leave();
    }
}
inline void __syncwarp(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    if (!shim::is_disabled(file, line)) {
        int nothing = 0;
        shim::together(nothing, [](void* const(&)[32]) {});
    }
}
inline void __threadfence() {}

template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
    shim::check_mask(mask);
    return shim::from_lane(value, source);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
    shim::check_mask(mask);
    return shim::from_lane(value, shim::lane() ^ bits);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    shim::check_mask(mask);
    struct Ballot {
        bool vote;
        unsigned result;
    } ballot{predicate != 0, 0};
    shim::together(ballot, [](void* const(&lanes)[32]) {
        unsigned votes = 0;
        for (int i = 0; i < 32; ++i) {
            votes |= static_cast<unsigned>(static_cast<Ballot*>(lanes[i])->vote) << i;
        }
        for (void* lane : lanes) {
            static_cast<Ballot*>(lane)->result = votes;
        }
    });
    return ballot.result;
}

template <class T>
T atomicAdd(T* at, T value) {
    const T old = *at;
    *at = old + value;
    return old;
}
inline unsigned atomicInc(unsigned* at, unsigned limit) {
    const unsigned old = *at;
    *at = old >= limit ? 0 : old + 1;
    return old;
}

using std::max;
using std::min;
inline float __fmul_rn(float a, float b) {
    return a * b;
}
inline float __fadd_rn(float a, float b) {
    return a + b;
}
inline float __fsub_rn(float a, float b) {
    return a - b;
}
inline float __frsqrt_rn(float x) {
    return static_cast<float>(1.0 / std::sqrt(double{x}));
}
inline float __expf(float x) {
    return std::exp(x);
}
inline float __uint_as_float(unsigned x) {
    float f;
    std::memcpy(&f, &x, 4);
    return f;
}
inline unsigned __float_as_uint(float x) {
    unsigned u;
    std::memcpy(&u, &x, 4);
    return u;
}
inline int __float_as_int(float x) {
    return static_cast<int>(__float_as_uint(x));
}
