#include "kernels.h"

#include <cstring>
#include <limits>

// One binary serves every x86-64: the loader picks the widest of these that the machine has. The results are the
// same bits in all of them: lanes are fixed by the code, and a product of two float32 is exact in float64, fused
// or not. (Other compilers and processors take the plain version, vectorised for their baseline.)
// CWCLIP_NO_CLONES: sanitizers start after the loader has picked.
#if !defined(CWCLIP_NO_CLONES) && defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define CWCLIP_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CWCLIP_CLONES
#endif
#define CWCLIP_INLINE static inline __attribute__((always_inline))

namespace cwclip::cpu {
namespace {

// ---------------------------------------------------------------------------------------------------------------
// Eight elements at a time, in the compiler's own vectors

constexpr int64_t kLanes = 8;
using F64x8 = double __attribute__((vector_size(64)));
using F32x8 = float __attribute__((vector_size(32)));
using I64x8 = int64_t __attribute__((vector_size(64)));
using I32x8 = int32_t __attribute__((vector_size(32)));
using U16x8 = uint16_t __attribute__((vector_size(16)));

template <class Vector>
CWCLIP_INLINE Vector load(const void* p) {
  Vector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// bfloat16 is the upper half of a float32.
CWCLIP_INLINE F32x8 from_bf16(U16x8 bits) {
  return reinterpret_cast<F32x8>(__builtin_convertvector(bits, I32x8) << 16);
}

// Integer arithmetic, because F16C is not in the x86-64 baseline and flush-to-zero must not lose subnormals.
CWCLIP_INLINE F32x8 from_f16(U16x8 bits) {
  const I32x8 wide = __builtin_convertvector(bits, I32x8);
  const I32x8 magnitude = wide & 0x7fff, sign = (wide & 0x8000) << 16;
  const I32x8 normal = (magnitude << 13) + (112 << 23);
  const I32x8 special = (magnitude << 13) | 0x7f800000;
  const I32x8 subnormal = reinterpret_cast<I32x8>(__builtin_convertvector(magnitude, F32x8) * 0x1p-24f);
  const I32x8 finite = magnitude < 0x0400 ? subnormal : normal;
  return reinterpret_cast<F32x8>((magnitude >= 0x7c00 ? special : finite) | sign);
}

CWCLIP_INLINE U16x8 to_bf16(F32x8 value) {
  const I32x8 bits = reinterpret_cast<I32x8>(value);
  const I32x8 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector(value != value ? I32x8{} + 0x7fc0 : rounded, U16x8);
}

CWCLIP_INLINE U16x8 to_f16(F32x8 value) {
  const I32x8 bits = reinterpret_cast<I32x8>(value);
  const I32x8 magnitude = bits & 0x7fffffff, sign = (bits >> 16) & 0x8000;
  const I32x8 normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Adding 0.5 moves a subnormal's last place to the last place of the float32 sum, which rounds it.
  const F32x8 shifted = reinterpret_cast<F32x8>(magnitude) + 0.5f;
  const I32x8 subnormal = reinterpret_cast<I32x8>(shifted) - 0x3f000000;
  const I32x8 special = magnitude > 0x7f800000 ? I32x8{} + 0x7e00 : I32x8{} + 0x7c00;
  const I32x8 finite = magnitude < 0x38800000 ? subnormal : normal;
  return __builtin_convertvector((magnitude >= 0x477ff000 ? special : finite) | sign, U16x8);
}

struct F32 {
  using Bits = I32x8;
  static constexpr int64_t kSize = 4;
  CWCLIP_INLINE F64x8 widen(const void* p) { return __builtin_convertvector(load<F32x8>(p), F64x8); }
  CWCLIP_INLINE Bits magnitude(const void* p) { return load<I32x8>(p) & 0x7fffffff; }
  CWCLIP_INLINE double value(int32_t bits) { float f; std::memcpy(&f, &bits, 4); return f; }
  CWCLIP_INLINE void scale(void* p, double coef) {
    const F32x8 v = load<F32x8>(p) * static_cast<float>(coef);
    std::memcpy(p, &v, sizeof v);
  }
};

struct F64 {
  using Bits = I64x8;
  static constexpr int64_t kSize = 8;
  CWCLIP_INLINE F64x8 widen(const void* p) { return load<F64x8>(p); }
  CWCLIP_INLINE Bits magnitude(const void* p) { return load<I64x8>(p) & std::numeric_limits<int64_t>::max(); }
  CWCLIP_INLINE double value(int64_t bits) { double d; std::memcpy(&d, &bits, 8); return d; }
  CWCLIP_INLINE void scale(void* p, double coef) {
    const F64x8 v = load<F64x8>(p) * coef;
    std::memcpy(p, &v, sizeof v);
  }
};

template <F32x8 (*kFrom)(U16x8), U16x8 (*kTo)(F32x8)>
struct Half {
  using Bits = I32x8;
  static constexpr int64_t kSize = 2;
  CWCLIP_INLINE F64x8 widen(const void* p) { return __builtin_convertvector(kFrom(load<U16x8>(p)), F64x8); }
  CWCLIP_INLINE Bits magnitude(const void* p) {
    return reinterpret_cast<I32x8>(kFrom(load<U16x8>(p))) & 0x7fffffff;
  }
  CWCLIP_INLINE double value(int32_t bits) { return F32::value(bits); }
  CWCLIP_INLINE void scale(void* p, double coef) {
    const U16x8 v = kTo(kFrom(load<U16x8>(p)) * static_cast<float>(coef));
    std::memcpy(p, &v, sizeof v);
  }
};
using BF16 = Half<from_bf16, to_bf16>;
using F16 = Half<from_f16, to_f16>;

// ---------------------------------------------------------------------------------------------------------------
// Runs of any length: whole vectors in place, the remainder through a zero-padded copy

constexpr int kUnroll = 8;
// The hardware's prefetchers stop at the end of a page; a hint this far ahead carries the stream across it.
constexpr int64_t kPrefetchBytes = 2048;

template <class T, bool kSquare>
CWCLIP_INLINE double sum_powers(const char* p, int64_t n) {
  F64x8 sums[kUnroll] = {};
  const auto add = [](F64x8& sum, F64x8 x) __attribute__((always_inline)) {
    if constexpr (kSquare) {
      sum += x * x;
    } else {
      sum += reinterpret_cast<F64x8>(reinterpret_cast<I64x8>(x) & std::numeric_limits<int64_t>::max());
    }
  };
  constexpr int64_t kStep = kLanes * T::kSize;
  for (; n >= kUnroll * kLanes; n -= kUnroll * kLanes, p += kUnroll * kStep) {
    for (int64_t line = 0; line < kUnroll * kStep; line += 64) __builtin_prefetch(p + kPrefetchBytes + line);
    for (int u = 0; u < kUnroll; ++u) add(sums[u], T::widen(p + u * kStep));
  }
  for (; n >= kLanes; n -= kLanes, p += kStep) add(sums[0], T::widen(p));
  if (n > 0) {
    char padded[kStep] = {};
    std::memcpy(padded, p, n * T::kSize);
    add(sums[1], T::widen(padded));
  }
  F64x8 lanes = {};
  for (int u = 0; u < kUnroll; ++u) lanes += sums[u];
  double sum = 0;
  for (int j = 0; j < kLanes; ++j) sum += lanes[j];
  return sum;
}

// Without their sign, floats order as the integers of the same bits, with inf above all numbers and NaN above inf.
template <class T>
CWCLIP_INLINE double max_magnitude(const char* p, int64_t n) {
  using Bits = typename T::Bits;
  Bits most[4] = {};
  const auto take = [](Bits& most, Bits x) __attribute__((always_inline)) { most = x > most ? x : most; };
  constexpr int64_t kStep = kLanes * T::kSize;
  for (; n >= 4 * kLanes; n -= 4 * kLanes, p += 4 * kStep) {
    for (int64_t line = 0; line < 4 * kStep; line += 64) __builtin_prefetch(p + kPrefetchBytes + line);
    for (int u = 0; u < 4; ++u) take(most[u], T::magnitude(p + u * kStep));
  }
  for (; n >= kLanes; n -= kLanes, p += kStep) take(most[0], T::magnitude(p));
  if (n > 0) {
    char padded[kStep] = {};
    std::memcpy(padded, p, n * T::kSize);
    take(most[0], T::magnitude(padded));
  }
  auto result = most[0][0];
  for (int u = 0; u < 4; ++u) {
    for (int j = 0; j < kLanes; ++j) result = most[u][j] > result ? most[u][j] : result;
  }
  return T::value(result);
}

template <class T>
CWCLIP_INLINE void scale_run(char* p, int64_t n, double coef) {
  constexpr int64_t kStep = kLanes * T::kSize;
  for (; n >= kLanes; n -= kLanes, p += kStep) T::scale(p, coef);
  if (n > 0) {
    char padded[kStep] = {};
    std::memcpy(padded, p, n * T::kSize);
    T::scale(padded, coef);
    std::memcpy(p, padded, n * T::kSize);
  }
}

// ---------------------------------------------------------------------------------------------------------------
// One function for each dtype and order, so that the compiler clones each for every instruction set

#define CWCLIP_KERNELS(T)                                                                              \
  CWCLIP_CLONES double sum_squares_##T(const char* p, int64_t n) { return sum_powers<T, true>(p, n); } \
  CWCLIP_CLONES double sum_abs_##T(const char* p, int64_t n) { return sum_powers<T, false>(p, n); }    \
  CWCLIP_CLONES double max_abs_##T(const char* p, int64_t n) { return max_magnitude<T>(p, n); }        \
  CWCLIP_CLONES void scale_##T(char* p, int64_t n, double coef) { scale_run<T>(p, n, coef); }

CWCLIP_KERNELS(F32)
CWCLIP_KERNELS(BF16)
CWCLIP_KERNELS(F16)
CWCLIP_KERNELS(F64)

struct Kernels {
  double (*sum_squares)(const char*, int64_t);
  double (*sum_abs)(const char*, int64_t);
  double (*max_abs)(const char*, int64_t);
  void (*scale)(char*, int64_t, double);
};

const Kernels& kernels_of(DType dtype) {
  static const Kernels table[] = {
      {sum_squares_F32, sum_abs_F32, max_abs_F32, scale_F32},
      {sum_squares_BF16, sum_abs_BF16, max_abs_BF16, scale_BF16},
      {sum_squares_F16, sum_abs_F16, max_abs_F16, scale_F16},
      {sum_squares_F64, sum_abs_F64, max_abs_F64, scale_F64},
  };
  return table[static_cast<int>(dtype)];
}

}  // namespace

double power_sum(const void* data, int64_t n, DType dtype, Order order) {
  const Kernels& kernels = kernels_of(dtype);
  const char* p = static_cast<const char*>(data);
  switch (order) {
    case Order::one: return kernels.sum_abs(p, n);
    case Order::two: return kernels.sum_squares(p, n);
    default: return kernels.max_abs(p, n);
  }
}

void scale(void* data, int64_t n, DType dtype, double coef) {
  kernels_of(dtype).scale(static_cast<char*>(data), n, coef);
}

}  // namespace cwclip::cpu
