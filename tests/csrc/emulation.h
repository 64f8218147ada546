// CUDA kernels on a CPU, for tests: a fiber for each thread of a block, one block after another.
//
// What one thread may not rely on of another is made as bad as the programming model allows.
// Between two barriers one warp after another runs, in a random order, and so do the threads of a
// warp between its operations; shared memory starts as NaN; asynchronous copies arrive when they
// are waited for and no earlier; an operation of a warp that not all of its threads reach is an
// error, as is a barrier that not all of a block do. What stays unseen: an operation of a warp
// orders its memory here as a barrier of the warp does. x86-64 only.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <new>
#include <numeric>
#include <random>
#include <vector>

// the headers of CUDA, as a C++ compiler sees them
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

// saves the registers a call preserves on this stack, and goes on with another
extern "C" void fastlora_switch_stack(void** from, void* to);
asm(R"(
.text
.weak fastlora_switch_stack
fastlora_switch_stack:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");

namespace fastlora::emulation {

constexpr int kWarp = 32, kMostThreads = 1024;
// the least that a block can have on any architecture from sm_80 on: that of sm_86, sm_89, sm_120
constexpr size_t kMostShared = 101376;
constexpr size_t kStackBytes = 128 << 10;
// every NaN of 16 bits and more
constexpr int kPoison = 0xFF;

enum class Waits { nothing, warp, block, ended };

struct Copy {
  void* to;
  const void* from;
};

struct Fiber {
  void* stack_pointer;
  std::unique_ptr<char[]> stack;
  void* shadow;
  Waits waits;
  uint3 index;
  int exchanges;
  std::deque<std::vector<Copy>> copies;
};

// What a thread hands to the others of its warp. Two of each, as one may be read still while the
// next is written.
struct Slot {
  alignas(16) char bytes[2][64];
};

struct Device {
  std::vector<Fiber> fibers;
  std::vector<Slot> slots = std::vector<Slot>(kMostThreads);
  std::function<void()> body;
  std::unique_ptr<char[]> shared;
  int current = 0;
  void* scheduler = nullptr;
  void* scheduler_shadow = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  dim3 grid, block;
  uint3 block_index, thread_index;
  // of the order threads run in
  std::mt19937 random;
  int64_t launches = 0, threads = 0;
};
inline Device device;

[[noreturn]] inline void fail(const char* what) {
  const uint3 b = device.block_index;
  std::fprintf(stderr, "block (%u, %u, %u), thread %d: %s\n", b.x, b.y, b.z, device.current, what);
  std::abort();
}

inline void leave_stack([[maybe_unused]] void** shadow, [[maybe_unused]] const void* stack,
                        [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(shadow, stack, bytes);
#endif
}
inline void enter_stack([[maybe_unused]] void* shadow, [[maybe_unused]] const void** stack,
                        [[maybe_unused]] size_t* bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(shadow, stack, bytes);
#endif
}

inline void wait(Waits waits) {
  Fiber& fiber = device.fibers[device.current];
  fiber.waits = waits;
  leave_stack(waits == Waits::ended ? nullptr : &fiber.shadow, device.scheduler_stack,
              device.scheduler_stack_bytes);
  fastlora_switch_stack(&fiber.stack_pointer, device.scheduler);
  enter_stack(fiber.shadow, nullptr, nullptr);
  device.thread_index = fiber.index;
}

inline void run_thread() {
  enter_stack(nullptr, &device.scheduler_stack, &device.scheduler_stack_bytes);
  device.body();
  wait(Waits::ended);
}

inline void start(Fiber& fiber, int thread) {
  const dim3 block = device.block;
  if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
  const uintptr_t end = reinterpret_cast<uintptr_t>(fiber.stack.get() + kStackBytes);
  void** top = reinterpret_cast<void**>(end & ~uintptr_t(15));
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(run_thread);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  fiber.stack_pointer = top;
  fiber.waits = Waits::nothing;
  fiber.index = {thread % block.x, thread / block.x % block.y, thread / block.x / block.y};
  fiber.exchanges = 0;
  fiber.copies.assign(1, {});
}

// Lets threads [begin, end) go on where all of them wait for this.
inline bool release(int begin, int end, Waits waits) {
  const auto waiting = [&](const Fiber& fiber) { return fiber.waits == waits; };
  const auto first = device.fibers.begin() + begin, last = device.fibers.begin() + end;
  if (!std::all_of(first, last, waiting)) return false;
  for (auto fiber = first; fiber != last; ++fiber) fiber->waits = Waits::nothing;
  return true;
}

inline void resume(int thread) {
  Fiber& fiber = device.fibers[thread];
  if (fiber.waits != Waits::nothing) return;
  device.current = thread;
  device.thread_index = fiber.index;
  leave_stack(&device.scheduler_shadow, fiber.stack.get(), kStackBytes);
  fastlora_switch_stack(&device.scheduler, fiber.stack_pointer);
  enter_stack(device.scheduler_shadow, nullptr, nullptr);
}

// As far as its threads get without those of other warps.
inline void run_warp(int warp) {
  int order[kWarp];
  std::iota(order, order + kWarp, warp * kWarp);
  do {
    std::shuffle(order, order + kWarp, device.random);
    for (const int thread : order) resume(thread);
  } while (release(warp * kWarp, (warp + 1) * kWarp, Waits::warp));
}

inline void run_block() {
  const int count = int(device.block.x * device.block.y * device.block.z);
  if (count % kWarp) fail("a block of whole warps only");
  device.fibers.resize(std::max(device.fibers.size(), size_t(count)));
  for (int i = 0; i < count; ++i) start(device.fibers[i], i);
  std::vector<int> order(count / kWarp);
  std::iota(order.begin(), order.end(), 0);
  do {
    std::shuffle(order.begin(), order.end(), device.random);
    for (const int warp : order) run_warp(warp);
  } while (release(0, count, Waits::block));
  for (int i = 0; i < count; ++i) {
    device.current = i;
    if (device.fibers[i].waits != Waits::ended) fail("waits for threads that do not come");
  }
}

inline void run(dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> body) {
  if (shared_bytes > kMostShared) fail("more shared memory than every architecture has");
  // as much as was asked for, so that the first byte beyond is seen
  device.shared.reset(new char[shared_bytes]);
  device.grid = grid;
  device.block = block;
  device.body = std::move(body);
  ++device.launches;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        device.block_index = {x, y, z};
        device.threads += block.x * block.y * block.z;
        std::memset(device.shared.get(), kPoison, shared_bytes);
        run_block();
      }
  device.shared.reset();
}

// The values that the threads of this warp hand in, by lane; valid up to the next call but one.
template <class T>
struct Exchanged {
  const Slot* slots;
  int which;
  const T& operator[](int lane) const {
    return *std::launder(reinterpret_cast<const T*>(slots[lane].bytes[which]));
  }
};

inline int lane() { return device.current % kWarp; }

// How tensor cores add: all terms are aligned to the largest, cut off a few bits below what a
// float32 of its size has, added up, and the sum is cut off to float32. A model of what was
// measured (Fasi, Higham, Mikaitis and Pranesh 2021, "Numerical behavior of NVIDIA tensor cores";
// of Hopper, Khattak and Mikaitis 2025, arXiv:2512.07004), which nobody promises.
constexpr int kMantissaBits = 24, kExtraBits = 2;
// of these, the last is what products are added to
constexpr int kTerms = 17;

inline double power_of_two(int exponent) {
  const uint64_t bits = uint64_t(exponent + 1023) << 52;
  double power;
  std::memcpy(&power, &bits, sizeof power);
  return power;
}

inline float add_truncated(const double (&terms)[kTerms]) {
  double largest = 0, plain = 0;
  for (const double term : terms) {
    largest = std::max(largest, std::fabs(term));
    plain += term;
  }
  if (largest == 0 || !std::isfinite(plain)) return float(plain);
  // in units of the last bit that is kept
  const int unit = std::ilogb(largest) - (kMantissaBits - 1) - kExtraBits;
  const double units = power_of_two(-unit);
  int64_t sum = 0;
  for (const double term : terms) sum += int64_t(term * units);
  const int64_t size = std::abs(sum);
  const int cut = std::max(0, 64 - kMantissaBits - (size ? __builtin_clzll(size) : 64));
  return float(double(sum < 0 ? -(size >> cut) : size >> cut) * power_of_two(unit + cut));
}

template <class T>
Exchanged<T> exchange(const T& value) {
  static_assert(sizeof(T) <= sizeof(Slot::bytes[0]));
  const int which = device.fibers[device.current].exchanges++ % 2;
  new (device.slots[device.current].bytes[which]) T(value);
  wait(Waits::warp);
  return {&device.slots[device.current / kWarp * kWarp], which};
}

}  // namespace fastlora::emulation

#define threadIdx fastlora::emulation::device.thread_index
#define blockIdx fastlora::emulation::device.block_index
#define blockDim fastlora::emulation::device.block
#define gridDim fastlora::emulation::device.grid

using std::max;
using std::min;
inline void __syncthreads() { fastlora::emulation::wait(fastlora::emulation::Waits::block); }
inline void __syncwarp() { fastlora::emulation::wait(fastlora::emulation::Waits::warp); }
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return fastlora::emulation::exchange(value)[fastlora::emulation::lane() ^ mask];
}

namespace fastlora::cuda {

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes,
                   cudaStream_t, Arguments... arguments) {
  if (grid.y > 65535 || grid.z > 65535 || grid.x > 0x7FFFFFFF) return cudaErrorInvalidValue;
  if (!grid.x || !grid.y || !grid.z) return cudaSuccess;
  emulation::run(grid, dim3(threads), shared_bytes, [=] { kernel(Parameters(arguments)...); });
  return cudaSuccess;
}

template <class T>
T* shared_memory() {
  return reinterpret_cast<T*>(emulation::device.shared.get());
}

// the compiler has to be kept from contracting these, too, where the CPU has such instructions
inline double multiply_rounded(double a, double b) { return a * b; }
inline double add_rounded(double a, double b) { return a + b; }

inline void copy_async(void* shared, const void* global, bool exists) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 ||
      (exists && reinterpret_cast<uintptr_t>(global) % 16))
    emulation::fail("an asynchronous copy that is not aligned");
  emulation::device.fibers[emulation::device.current].copies.back().push_back(
      {shared, exists ? global : nullptr});
}

inline void commit_copies() {
  emulation::device.fibers[emulation::device.current].copies.push_back({});
}

template <int Left>
void wait_for_copies() {
  auto& copies = emulation::device.fibers[emulation::device.current].copies;
  // the last is the group that is not committed yet
  while (int(copies.size()) - 1 > Left) {
    for (const emulation::Copy& copy : copies.front()) {
      if (copy.from)
        std::memcpy(copy.to, copy.from, 16);
      else
        std::memset(copy.to, 0, 16);
    }
    copies.pop_front();
  }
}

template <bool Transposed>
void load_matrices(uint32_t (&out)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) emulation::fail("a row that is not aligned");
  const auto rows = emulation::exchange(static_cast<const uint16_t*>(row));
  const int g = emulation::lane() / 4, q = emulation::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    uint32_t pair[2];
    for (int j = 0; j < 2; ++j)
      pair[j] = Transposed ? rows[8 * i + 2 * q + j][g] : rows[8 * i + g][2 * q + j];
    out[i] = pair[0] | pair[1] << 16;
  }
  // the rows of others must not change before they are read
  __syncwarp();
}

template <class T>
void multiply(float (&sum)[4], const uint32_t (&left)[4], const uint32_t (&right)[2]) {
  using Bits = std::conditional_t<std::is_same_v<T, __half>, __half_raw, __nv_bfloat16_raw>;
  struct Fragments {
    float left[8], right[4];
  } mine;
  for (int i = 0; i < 8; ++i) mine.left[i] = T(Bits{uint16_t(left[i / 2] >> i % 2 * 16)});
  for (int i = 0; i < 4; ++i) mine.right[i] = T(Bits{uint16_t(right[i / 2] >> i % 2 * 16)});
  const auto all = emulation::exchange(mine);
  const int g = emulation::lane() / 4, q = emulation::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    double terms[emulation::kTerms];
    double* term = terms;
    // columns of the left operand that one thread has
    for (int of = 0; of < 4; ++of) {
      const float *l = all[4 * g + of].left, *r = all[4 * (2 * q + i % 2) + of].right;
      for (int j = 0; j < 4; ++j) *term++ = double(l[j % 2 + j / 2 * 4 + i / 2 * 2]) * r[j];
    }
    *term = sum[i];
    sum[i] = emulation::add_truncated(terms);
  }
}

}  // namespace fastlora::cuda
