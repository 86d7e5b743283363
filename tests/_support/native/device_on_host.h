// csrc/cuda/device.cuh for a CPU: the same names, so that the suite runs csrc/cuda/ where there is no GPU.
//
// Blocks and their threads are fibers (blocks.h), or, with CWCLIP_BLOCKS_AS_THREADS, one host thread for each warp of
// one lane, for ThreadSanitizer to judge what blocks hand each other.
#pragma once

#include "blocks.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#define CWCLIP_DEVICE inline
#define CWCLIP_KERNEL inline
#define CWCLIP_BOUNDS(threads, blocks)
#define CWCLIP_PARAMETER(type) const type&
#define CWCLIP_SHARED(type, name) type& name = *static_cast<type*>(on_host::shared_memory(sizeof(type)))

namespace cwclip::cuda {

#if defined(CWCLIP_BLOCKS_AS_THREADS)
constexpr int kLanes = 1;
constexpr int kWorkerWarps = 1;
#else
constexpr int kLanes = 32;
constexpr int kWorkerWarps = 8;
#endif

struct alignas(16) Vector {
  uint32_t word[4];
};
struct alignas(8) HalfVector {
  uint32_t word[2];
};

inline int thread_index() { return on_host::thread_index(); }
inline uint32_t block_index() { return on_host::block_index(); }
inline uint32_t block_count() { return on_host::block_count(); }

inline void block_barrier() { on_host::block_barrier(); }
struct Signal {
  uint64_t phase;
  uint32_t expected, pending;
};
inline void init_signal(Signal* signal, uint32_t arrivals) { *signal = {0, arrivals, arrivals}; }
inline void arrive(Signal* signal) {
  if (std::atomic_ref<uint32_t>(signal->pending).fetch_sub(1, std::memory_order_acq_rel) != 1) return;
  signal->pending = signal->expected;
  std::atomic_ref<uint64_t>(signal->phase).fetch_add(1, std::memory_order_release);
}
inline void wait_for(Signal* signal, uint32_t parity) { on_host::wait_while_parity(&signal->phase, parity); }
inline void worker_barrier() { on_host::worker_barrier(kLanes * kWorkerWarps); }
inline void warp_barrier() { on_host::warp_barrier(kLanes); }
inline uint32_t from_first_lane(uint32_t value) {
  return static_cast<uint32_t>(on_host::exchange(value, thread_index() / kLanes * kLanes, kLanes));
}
inline double from_first_lane(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, 8);
  bits = on_host::exchange(bits, thread_index() / kLanes * kLanes, kLanes);
  std::memcpy(&value, &bits, 8);
  return value;
}
inline double from_lane_above(double value, int distance) {
  uint64_t bits;
  std::memcpy(&bits, &value, 8);
  const int lane = thread_index() % kLanes;
  const int source = thread_index() + (lane + distance < kLanes ? distance : 0);
  bits = on_host::exchange(bits, source, kLanes);
  std::memcpy(&value, &bits, 8);
  return value;
}
inline void pause() { on_host::pause(); }
inline int hidden(int value) { return value; }

inline uint32_t fetch_add_relaxed(uint32_t* p, uint32_t n) {
  on_host::maybe_switch();
  return std::atomic_ref<uint32_t>(*p).fetch_add(n, std::memory_order_relaxed);
}
inline uint32_t fetch_add_acq_rel(uint32_t* p, uint32_t n) {
  on_host::maybe_switch();
  return std::atomic_ref<uint32_t>(*p).fetch_add(n, std::memory_order_acq_rel);
}
inline uint32_t load_acquire(const uint32_t* p) {
  on_host::maybe_switch();
  return std::atomic_ref<uint32_t>(*const_cast<uint32_t*>(p)).load(std::memory_order_acquire);
}
inline uint32_t load_relaxed(const uint32_t* p) {
  on_host::maybe_switch();
  return std::atomic_ref<uint32_t>(*const_cast<uint32_t*>(p)).load(std::memory_order_relaxed);
}
inline void store_relaxed(uint32_t* p, uint32_t value) {
  std::atomic_ref<uint32_t>(*p).store(value, std::memory_order_relaxed);
}
// ThreadSanitizer knows no fences: each store releases by itself.
inline void release_fence() {}
inline void publish(uint32_t* p, uint32_t value) {
  on_host::maybe_switch();
  std::atomic_ref<uint32_t>(*p).store(value, std::memory_order_release);
}
// A plain load here: order comes from the counter that was acquired before, and ThreadSanitizer shall see that it does.
inline double load_relaxed(const double* p) { return *p; }

inline void copy_async(Vector* to, const Vector* from) { on_host::copy_async(to, from); }
inline void wait_for_copies() { on_host::finish_copies(); }
inline void let_next_kernel_begin() {}
inline void wait_for_kernel_before() {}

template <class T>
inline const T* checked(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T) != 0) {
    std::fprintf(stderr, "a %zu-byte access to %p, which a GPU would refuse\n", sizeof(T), static_cast<const void*>(p));
    std::abort();
  }
  return p;
}
inline Vector load_vector(const Vector* p) { return *checked(p); }
inline Vector load_vector(const Vector* p, uint64_t) { return *checked(p); }
inline Vector load_vector_last(const Vector* p) { return *checked(p); }
inline void store_vector_last(Vector* p, Vector v) { *const_cast<Vector*>(checked(p)) = v; }
inline HalfVector load_vector_last(const HalfVector* p) { return *checked(p); }
inline void store_vector_last(HalfVector* p, HalfVector v) { *const_cast<HalfVector*>(checked(p)) = v; }

template <class To, class From>
To cast_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline uint32_t bits_of(float x) { return cast_bits<uint32_t>(x); }
inline float float_of(uint32_t bits) { return cast_bits<float>(bits); }
inline uint64_t bits_of(double x) { return cast_bits<uint64_t>(x); }
inline double double_of(uint64_t bits) { return cast_bits<double>(bits); }

inline float float_of_f16(uint16_t bits) { return static_cast<float>(cast_bits<_Float16>(bits)); }
inline uint32_t pack_f16(float low, float high) {
  const auto rounded = [](float x) { return uint32_t{cast_bits<uint16_t>(static_cast<_Float16>(x))}; };
  return rounded(low) | rounded(high) << 16;
}
inline uint32_t pack_bf16(float low, float high) {
  const auto rounded = [](float x) {
    const uint32_t bits = bits_of(x);
    return x == x ? (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16 : 0x7fffu;
  };
  return rounded(low) | rounded(high) << 16;
}

inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline double multiply_add(double a, double b, double c) { return std::fma(a, b, c); }
inline float product(float a, float b) { return a * b; }
inline double product(double a, double b) { return a * b; }
inline float quotient(float a, float b) { return a / b; }
inline double quotient(double a, double b) { return a / b; }
inline float square_root(float x) { return std::sqrt(x); }
inline double square_root(double x) { return std::sqrt(x); }
inline double power(double a, double b) { return std::pow(a, b); }

// On the host.

using Stream = void*;
using Failure = const char*;

inline Failure set_device(int) { return nullptr; }

inline Failure count_processors(int, int* count) {
  *count = on_host::machine.processors;
  return nullptr;
}

template <auto kernel>
Failure find_traits(int, Traits* traits) {
  *traits = {on_host::machine.l2_bytes, true};
  return nullptr;
}

inline Failure is_capturing(Stream, bool* capturing) {
  *capturing = on_host::machine.capturing;
  return nullptr;
}

inline Failure number_of(Stream, unsigned long long* number) {
  *number = on_host::machine.stream_number;
  return nullptr;
}

template <auto kernel>
Failure find_image() {
  return nullptr;
}

inline Failure find_driver(int* version) {
  *version = on_host::machine.driver;
  return nullptr;
}

template <auto kernel, class... Parameters>
Failure launch(uint32_t blocks, int threads, Stream, bool, const Parameters&... parameters) {
  if (on_host::machine.runs) on_host::run(blocks, threads, [&] { kernel(parameters...); });
  return nullptr;
}

}  // namespace cwclip::cuda
