// The device primitives of kernels and launches under names of our own: thread indices, barriers, shuffles, atomics with
// their memory order, conversions, devices and streams. Here for GPUs; tests/_support/native/device_on_host.h has the same
// names for a CPU, so that tests run all of csrc/cuda/ without a GPU.
#pragma once

#include "program.h"

#if defined(__CUDACC__)

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "the CUDA kernels need compute capability 8.0: leave older ones out of TORCH_CUDA_ARCH_LIST"
#endif

#define CWCLIP_DEVICE __device__ __forceinline__
#define CWCLIP_KERNEL __global__
#define CWCLIP_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define CWCLIP_PARAMETER(type) const __grid_constant__ type
#define CWCLIP_SHARED(type, name) __shared__ type name

namespace cwclip::cuda {

constexpr int kLanes = 32;
constexpr int kWorkerWarps = 8;

struct alignas(16) Vector {
  uint32_t word[4];
};
struct alignas(8) HalfVector {
  uint32_t word[2];
};

CWCLIP_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
CWCLIP_DEVICE uint32_t block_index() { return blockIdx.x; }
CWCLIP_DEVICE uint32_t block_count() { return gridDim.x; }

CWCLIP_DEVICE void block_barrier() { __syncthreads(); }

// A barrier in shared memory (mbarrier) at which some of a block's threads arrive and others wait: a phase ends with the
// last arrival, and what those who arrived wrote before is there for those who waited for it. Phases have parity 0, 1, 0 ...
struct alignas(8) Signal {
  uint64_t state;
};
CWCLIP_DEVICE uint32_t address_in_shared(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
CWCLIP_DEVICE void init_signal(Signal* signal, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(address_in_shared(signal)), "r"(arrivals) : "memory");
}
CWCLIP_DEVICE void arrive(Signal* signal) {
  asm volatile("{ .reg .b64 phase; mbarrier.arrive.shared.b64 phase, [%0]; }" ::"r"(address_in_shared(signal)) : "memory");
}
CWCLIP_DEVICE void wait_for(Signal* signal, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
#define CWCLIP_WAIT "mbarrier.try_wait.parity.shared.b64"
#else
#define CWCLIP_WAIT "mbarrier.test_wait.parity.shared.b64"
#endif
  uint32_t ended;
  do {
    asm volatile("{ .reg .pred p; " CWCLIP_WAIT " p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(ended)
                 : "r"(address_in_shared(signal)), "r"(parity)
                 : "memory");
  } while (ended == 0);
}
// For the worker warps alone: barrier 0 is the block's.
CWCLIP_DEVICE void worker_barrier() { asm volatile("barrier.sync 1, %0;" ::"n"(kLanes * kWorkerWarps) : "memory"); }
CWCLIP_DEVICE void warp_barrier() { __syncwarp(); }
CWCLIP_DEVICE uint32_t from_first_lane(uint32_t value) { return __shfl_sync(0xffffffffu, value, 0); }
CWCLIP_DEVICE double from_first_lane(double value) { return __shfl_sync(0xffffffffu, value, 0); }
CWCLIP_DEVICE double from_lane_above(double value, int distance) {
  return __shfl_down_sync(0xffffffffu, value, distance);
}
CWCLIP_DEVICE void pause() { __nanosleep(100); }

// The same value, of which the compiler knows nothing, and no load is moved to before it.
CWCLIP_DEVICE int hidden(int value) {
  asm volatile("" : "+r"(value)::"memory");
  return value;
}

// What blocks share. Relaxed: the value alone. Acquire and release: with everything written before. After release_fence(),
// what publish() stores is seen with everything written before the fence: one fence for many stores.
CWCLIP_DEVICE uint32_t fetch_add_relaxed(uint32_t* p, uint32_t n) {
  uint32_t old;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(n) : "memory");
  return old;
}
CWCLIP_DEVICE uint32_t fetch_add_acq_rel(uint32_t* p, uint32_t n) {
  uint32_t old;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(n) : "memory");
  return old;
}
CWCLIP_DEVICE uint32_t load_acquire(const uint32_t* p) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}
CWCLIP_DEVICE uint32_t load_relaxed(const uint32_t* p) {
  uint32_t value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}
CWCLIP_DEVICE void store_relaxed(uint32_t* p, uint32_t value) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}
CWCLIP_DEVICE void release_fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
CWCLIP_DEVICE void publish(uint32_t* p, uint32_t value) { store_relaxed(p, value); }
// Written by another block: not from this processor's own cache.
CWCLIP_DEVICE double load_relaxed(const double* p) {
  double value;
  asm volatile("ld.relaxed.gpu.global.f64 %0, [%1];" : "=d"(value) : "l"(p) : "memory");
  return value;
}

// 16 bytes of a table to shared memory, without a register in between; there after wait_for_copies(), for this thread.
CWCLIP_DEVICE void copy_async(Vector* to, const Vector* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address_in_shared(to)), "l"(from) : "memory");
}
CWCLIP_DEVICE void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Programmatic dependent launch: the next kernel's blocks may begin where there is room for them, and wait until the one
// before has ended and all that it wrote is there. Nothing, if a launch wasn't made so.
CWCLIP_DEVICE void let_next_kernel_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
CWCLIP_DEVICE void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Gradients, 16 bytes at a time. First read: kept in L2, not in L1, since another processor may read it again. Last read,
// and write: kept in neither.
CWCLIP_DEVICE Vector load_vector(const Vector* p) {
  const uint4 v = __ldcg(reinterpret_cast<const uint4*>(p));
  return {{v.x, v.y, v.z, v.w}};
}
// With how long L2 keeps it: a cache policy, which costs no registers only as a kernel's parameter.
CWCLIP_DEVICE Vector load_vector(const Vector* p, uint64_t policy) {
  Vector v;
  asm("ld.global.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
      : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
      : "l"(p), "l"(policy));
  return v;
}
CWCLIP_DEVICE Vector load_vector_last(const Vector* p) {
  const uint4 v = __ldcs(reinterpret_cast<const uint4*>(p));
  return {{v.x, v.y, v.z, v.w}};
}
CWCLIP_DEVICE void store_vector_last(Vector* p, Vector v) {
  __stcs(reinterpret_cast<uint4*>(p), make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]));
}

CWCLIP_DEVICE HalfVector load_vector_last(const HalfVector* p) {
  const uint2 v = __ldcs(reinterpret_cast<const uint2*>(p));
  return {{v.x, v.y}};
}
CWCLIP_DEVICE void store_vector_last(HalfVector* p, HalfVector v) {
  __stcs(reinterpret_cast<uint2*>(p), make_uint2(v.word[0], v.word[1]));
}

CWCLIP_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
CWCLIP_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }
CWCLIP_DEVICE uint64_t bits_of(double x) { return static_cast<uint64_t>(__double_as_longlong(x)); }
CWCLIP_DEVICE double double_of(uint64_t bits) { return __longlong_as_double(static_cast<long long>(bits)); }

CWCLIP_DEVICE float float_of_f16(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
// To nearest even, two at a time, the first in the low half.
CWCLIP_DEVICE uint32_t pack_f16(float low, float high) {
  uint16_t a, b;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(a) : "f"(low));
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(b) : "f"(high));
  return a | static_cast<uint32_t>(b) << 16;
}
CWCLIP_DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

CWCLIP_DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
CWCLIP_DEVICE double multiply_add(double a, double b, double c) { return __fma_rn(a, b, c); }
// IEEE, whatever flags the file is compiled with.
CWCLIP_DEVICE float product(float a, float b) { return __fmul_rn(a, b); }
CWCLIP_DEVICE double product(double a, double b) { return __dmul_rn(a, b); }
CWCLIP_DEVICE float quotient(float a, float b) { return __fdiv_rn(a, b); }
CWCLIP_DEVICE double quotient(double a, double b) { return __ddiv_rn(a, b); }
CWCLIP_DEVICE float square_root(float x) { return __fsqrt_rn(x); }
CWCLIP_DEVICE double square_root(double x) { return __dsqrt_rn(x); }
CWCLIP_DEVICE double power(double a, double b) { return ::pow(a, b); }

// ---------------------------------------------------------------------------------------------------------------------
// On the host
// ---------------------------------------------------------------------------------------------------------------------

using Stream = cudaStream_t;

// Why not, or null.
using Failure = const char*;
inline Failure failure_of(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

// For our static copy of the CUDA runtime. For torch's copy it is the current device already (backends/cuda.py), so nothing
// has to be restored afterwards.
inline Failure set_device(int device) { return failure_of(cudaSetDevice(device)); }

inline Failure ask(cudaDeviceAttr attribute, int device, int* value) {
  return failure_of(cudaDeviceGetAttribute(value, attribute, device));
}

inline Failure count_processors(int device, int* count) { return ask(cudaDevAttrMultiProcessorCount, device, count); }

// `kernel`: one that is launched to overlap.
template <auto kernel>
Failure find_traits(int device, Traits* traits) {
  int driver = 0;
  cudaFuncAttributes attributes;
  if (const Failure failure = ask(cudaDevAttrL2CacheSize, device, &traits->l2_bytes)) return failure;
  if (const Failure failure = failure_of(cudaDriverGetVersion(&driver))) return failure;
  if (const Failure failure = failure_of(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)))) {
    return failure;
  }
  // Compiled for less, the kernel wouldn't wait. Drivers before 12.4 can't capture such launches into a graph.
  traits->overlaps = CUDART_VERSION >= 12040 && driver >= 12040 && attributes.ptxVersion >= 90;
  return nullptr;
}

inline Failure is_capturing(Stream stream, bool* capturing) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const Failure failure = failure_of(cudaStreamIsCapturing(stream, &status));
  *capturing = status != cudaStreamCaptureStatusNone;
  return failure;
}

// A number that no other stream of this process ever has, unlike a handle, which a later stream may get. Drivers before
// CUDA 12 don't count streams: then the handle.
inline Failure number_of(Stream stream, unsigned long long* number) {
  const cudaError_t error = cudaStreamGetId(stream, number);
  if (error != cudaErrorCallRequiresNewerDriver && error != cudaErrorNotSupported) return failure_of(error);
  cudaGetLastError();
  *number = reinterpret_cast<uintptr_t>(stream);
  return nullptr;
}

// Whether this binary has a kernel for the current device.
template <auto kernel>
Failure find_image() {
  cudaFuncAttributes attributes;
  return failure_of(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)));
}

// The newest CUDA that the driver knows: 12010 for 12.1.
inline Failure find_driver(int* version) { return failure_of(cudaDriverGetVersion(version)); }

// Puts kernel(parameters...) on the current device's stream; `overlaps`: it may begin while the one before ends.
template <auto kernel, class... Parameters>
Failure launch(uint32_t blocks, int threads, Stream stream, bool overlaps, const Parameters&... parameters) {
  const void* addresses[] = {&parameters...};
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = overlaps ? 1 : 0;
  return failure_of(cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), const_cast<void**>(addresses)));
}

}  // namespace cwclip::cuda

#else
#include "device_on_host.h"
#endif
