// CUDA's execution model on the host, as far as the kernels use it: a block's threads are fibers
// that change places at barriers and shuffles, each time in another order, so that a missing barrier
// shows. Replaces cuda_device.cuh. A barrier that not all threads reach ends the program with a
// message. Where a test has registered device memory (cuda_faults.cpp), the host cannot touch it, a
// pointer to the host's stack is no argument, and every block finds the memory as it was when the
// launch began: no block may wait for another's result, and no two may write to one place.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emulation {

constexpr int kWarpSize = 32;
constexpr size_t kStackBytes = 128 * 1024;

struct Barrier {
  int expected = 0, arrived = 0;
  long generation = 0;
};

struct WarpSlots {  // what the lanes of a warp show each other
  Barrier barrier;
  double value[kWarpSize];
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  dim3 thread;
  bool done = true;
};

struct Block {
  ucontext_t scheduler;
  std::vector<Fiber> fibers;
  std::vector<WarpSlots> warps;
  Barrier barrier;
  std::function<void()> body;
  Fiber* current = nullptr;
  dim3 index;
  long steps = 0;  // barriers passed and threads ended: a round without any is a deadlock
};

inline Block& block() {
  static Block instance;
  return instance;
}

[[noreturn]] inline void stop(const char* why) {
  std::fprintf(stderr, "emulation: %s\n", why);
  std::abort();
}

inline unsigned random_number() {
  static unsigned state = 1;
  return (state = state * 1664525u + 1013904223u) >> 8;
}

struct Memory {
  struct Region {  // whole pages
    char* data;
    size_t size;
    std::vector<char> before, after;
    std::vector<bool> written;
  };
  std::vector<Region> regions;

  void allow(int protection) {
    for (Region& region : regions) mprotect(region.data, region.size, protection);
  }
  void begin() {
    allow(PROT_READ | PROT_WRITE);
    for (Region& region : regions) {
      region.before = region.after = {region.data, region.data + region.size};
      region.written.assign(region.size, false);
    }
  }
  void end_block() {
    for (Region& region : regions) {
      if (std::memcmp(region.data, region.before.data(), region.size) == 0) continue;
      for (size_t i = 0; i < region.size; ++i) {
        if (region.data[i] == region.before[i]) continue;
        if (region.written[i]) stop("two blocks write to one place");
        region.written[i] = true;
        region.after[i] = region.data[i];
        region.data[i] = region.before[i];
      }
    }
  }
  void end() {
    for (Region& region : regions) std::copy(region.after.begin(), region.after.end(), region.data);
    allow(PROT_NONE);
  }
};

inline Memory& memory() {
  static Memory instance;
  return instance;
}

template <class Argument> void check_argument(const Argument& argument) {
  constexpr size_t words = sizeof(Argument) / sizeof(uintptr_t);
  uintptr_t word[words + 1];
  std::memcpy(word, &argument, words * sizeof(uintptr_t));
  const uintptr_t here = reinterpret_cast<uintptr_t>(&word);
  for (size_t i = 0; i < words; ++i)
    if (word[i] > here - 65536 && word[i] < here + 1048576) stop("a host pointer among the arguments");
}

inline void yield() { swapcontext(&block().current->context, &block().scheduler); }

inline void wait(Barrier& barrier) {
  const long generation = barrier.generation;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    ++block().steps;
  }
  while (barrier.generation == generation) yield();
}

inline WarpSlots& warp() { return block().warps[block().current->thread.x / kWarpSize]; }
inline int lane() { return int(block().current->thread.x) % kWarpSize; }

inline void enter() {
  block().body();
  block().current->done = true;
  ++block().steps;
  yield();
}

inline void run_block(int threads) {
  Block& now = block();
  now.barrier = {threads};
  for (WarpSlots& slots : now.warps) slots.barrier = {kWarpSize};
  for (int t = 0; t < threads; ++t) {
    Fiber& fiber = now.fibers[t];
    fiber.thread = dim3(unsigned(t), 0, 0);
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    makecontext(&fiber.context, enter, 0);
  }
  for (int left = threads; left > 0;) {
    const long before = now.steps;
    const unsigned stride = random_number() | 1, shift = random_number();  // threads: a power of two
    for (int i = 0; i < threads; ++i) {
      Fiber& fiber = now.fibers[(i * stride + shift) % threads];
      if (fiber.done) continue;
      now.current = &fiber;
      swapcontext(&now.scheduler, &fiber.context);
      left -= fiber.done;
    }
    if (now.steps == before) stop("threads wait at a barrier that others do not reach");
  }
}

}  // namespace emulation

#define threadIdx (emulation::block().current->thread)
#define blockIdx (emulation::block().index)

inline void __syncthreads() { emulation::wait(emulation::block().barrier); }

namespace pemt {

using std::abs;
using std::max;
using std::min;
using std::sqrt;

struct bf16 {
  uint16_t bits;
};
using f16 = _Float16;

inline float real(bf16 value) {
  const uint32_t wide = uint32_t{value.bits} << 16;
  float result;
  std::memcpy(&result, &wide, sizeof result);
  return result;
}
inline float real(f16 value) { return float(value); }
inline float real(float value) { return value; }
inline double real(double value) { return value; }

template <class T, class R> T rounded(R value) {
  if constexpr (std::is_same_v<T, bf16>) {  // to nearest, ties to even
    uint32_t wide;
    const float narrow = float(value);
    std::memcpy(&wide, &narrow, sizeof wide);
    return {uint16_t((wide + 0x7fff + ((wide >> 16) & 1)) >> 16)};
  } else {
    return T(value);
  }
}

template <class R> R shuffle_xor(R value, int lane_mask) {
  emulation::WarpSlots& warp = emulation::warp();
  warp.value[emulation::lane()] = double(value);
  emulation::wait(warp.barrier);
  const R result = R(warp.value[emulation::lane() ^ lane_mask]);
  emulation::wait(warp.barrier);
  return result;
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, void*,
            const Arguments&... arguments) {
  emulation::Block& block = emulation::block();
  if (block.fibers.size() < size_t(threads)) block.fibers = std::vector<emulation::Fiber>(threads);
  block.warps = std::vector<emulation::WarpSlots>(threads / emulation::kWarpSize);
  block.body = [&] { kernel(arguments...); };
  emulation::Memory& memory = emulation::memory();
  if (!memory.regions.empty()) (emulation::check_argument(arguments), ...);
  memory.begin();
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; ++x) {
      block.index = dim3(x, y, 0);
      emulation::run_block(threads);
      memory.end_block();
    }
  memory.end();
}

}  // namespace pemt
