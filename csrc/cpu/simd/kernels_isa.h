// The code of every kernel, compiled once for each instruction set: a .cpp names the set (CWCLIP_ISA) and the width of
// its vectors (CWCLIP_VECTOR_BYTES: 16, or 32 with AVX2 and F16C, or 64 with AVX-512), and includes this.
// Nothing here may be shared between them, so everything has internal linkage, and no library template is used.

#include "kernels.h"

#include "vectors_isa.h"

#include "adamw_isa.h"

namespace cwclip::cpu::CWCLIP_ISA {
namespace {

// ---------------------------------------------------------------------------------------------------------------
// float32 and halves

template <bool kSquare>
CWCLIP_INLINE F32 power(F32 x) {
  return kSquare ? x * x : float_of(bits_of(x) & kMagnitude);
}

// Sixteen sums in float64, one for each lane.
struct WideSums {
  F64 lanes[2 * kParts] = {};

  CWCLIP_INLINE F64 widen(HalfF32 x) { return __builtin_convertvector(x, F64); }

  template <bool kSquare>
  __attribute__((always_inline)) void add(const F32 (&x)[kParts]) {
    CWCLIP_UNROLL for (int i = 0; i < kParts; ++i) {
      HalfF32 halves[2];
      std::memcpy(halves, &x[i], sizeof halves);
      CWCLIP_UNROLL for (int h = 0; h < 2; ++h) {
        const F64 wide = widen(halves[h]);
        lanes[2 * i + h] += kSquare ? wide * wide : wide;
      }
    }
  }

  double total() const {
    double values[16], sum = 0;
    std::memcpy(values, lanes, sizeof values);
    for (int j = 0; j < 8; ++j) sum += values[j] + values[8 + j];
    return sum;
  }
};

// Every element in float64.
template <class T, bool kSquare>
double sum_wide(const char* p, int64_t n) {
  WideSums sums;
  for_each_step<T::kSize, false>(const_cast<char*>(p), n, [&](const char* at) __attribute__((always_inline)) {
    Step v = T::read(at);
    if (!kSquare) {
      for (F32& x : v.a) x = power<false>(x);
      for (F32& x : v.b) x = power<false>(x);
    }
    sums.add<kSquare>(v.a);
    sums.add<kSquare>(v.b);
  });
  return sums.total();
}

// Eight terms and two levels of a tree in float32, everything beyond in float64: the error stays below 11 roundings of
// 2^-24, and conversions take no time.
constexpr int kTerms = 8;
constexpr int64_t kBlock = kTerms * 2 * kStep;

template <class T, bool kSquare>
double sum_blocks(const char* p, int64_t blocks) {
  WideSums sums;
  for (; blocks > 0; --blocks) {
    F32 a[2][kParts] = {}, b[2][kParts] = {};
    // Not unrolled: the compiler would reorder the loads, and the hardware's prefetchers follow only those that go
    // straight ahead (half the speed on a Zen 4; hints of our own cost a fifth, at any distance).
    _Pragma("GCC unroll 1") for (int term = 0; term < kTerms; ++term) {
      CWCLIP_UNROLL for (int half = 0; half < 2; ++half, p += kStep * T::kSize) {
        const Step v = T::read(p);
        CWCLIP_UNROLL for (int i = 0; i < kParts; ++i) {
          a[half][i] += power<kSquare>(v.a[i]);
          b[half][i] += power<kSquare>(v.b[i]);
        }
      }
    }
    F32 joined[kParts];
    CWCLIP_UNROLL for (int i = 0; i < kParts; ++i) joined[i] = (a[0][i] + b[0][i]) + (a[1][i] + b[1][i]);
    sums.add<false>(joined);
  }
  return sums.total();
}

// Without their sign, floats order as the integers of the same bits, with inf above all numbers and NaN above inf.
template <class T>
double max_magnitude(const char* p, int64_t n) {
  I32 most[2][kParts] = {};
  const auto take = [](I32& most, F32 x) __attribute__((always_inline)) {
    const I32 magnitude = bits_of(x) & kMagnitude;
    most = magnitude > most ? magnitude : most;
  };
  for_each_step<T::kSize, false>(const_cast<char*>(p), n, [&](const char* at) __attribute__((always_inline)) {
    const Step v = T::read(at);
    CWCLIP_UNROLL for (int i = 0; i < kParts; ++i) {
      take(most[0][i], v.a[i]);
      take(most[1][i], v.b[i]);
    }
  });
  int32_t lanes[32], result = 0;
  std::memcpy(lanes, most, sizeof lanes);
  for (const int32_t lane : lanes) result = lane > result ? lane : result;
  float value;
  std::memcpy(&value, &result, sizeof value);
  return value;
}

template <class T, bool kSquare>
double sum_powers(const char* p, int64_t n) {
  const int64_t blocks = n / kBlock, rest = n % kBlock;
  const double sum = sum_blocks<T, kSquare>(p, blocks);
  // Float32 neither overflowed, nor lost more than 2^-26 of a sum of this size to underflow (2^-126 for each term).
  const bool trusted = sum < __builtin_inf() && sum >= static_cast<double>(n) * 0x1p-100;
  if (trusted || blocks == 0) return sum + sum_wide<T, kSquare>(p + blocks * kBlock * T::kSize, rest);
  // Often all zeros: gradients of embeddings.
  if (sum == 0 && max_magnitude<T>(p, n) == 0) return 0;
  return sum_wide<T, kSquare>(p, n);
}

template <class T>
double power_sum(const char* p, int64_t n, Order order) {
  switch (order) {
    case Order::one: return sum_powers<T, false>(p, n);
    case Order::two: return sum_powers<T, true>(p, n);
    default: return max_magnitude<T>(p, n);
  }
}

template <class T>
void scale(char* p, int64_t n, double coef) {
  const float factor = static_cast<float>(coef);
  for_each_step<T::kSize, true>(p, n, [&](char* at) __attribute__((always_inline)) {
    Step v = T::read(at);
    CWCLIP_UNROLL for (int i = 0; i < kParts; ++i) {
      v.a[i] *= factor;
      v.b[i] *= factor;
    }
    T::write(at, v);
  });
}

// ---------------------------------------------------------------------------------------------------------------
// float64: thirty-two lanes

constexpr int kWideVectors = kStep * 8 / kBytes;

template <Order kOrder>
double power_sum_f64(const char* p, int64_t n) {
  F64 sums[kWideVectors] = {};
  I64 most[kWideVectors] = {};
  for_each_step<8, false>(const_cast<char*>(p), n, [&](const char* at) __attribute__((always_inline)) {
    CWCLIP_UNROLL for (int i = 0; i < kWideVectors; ++i) {
      const F64 x = load<F64>(at + i * kBytes);
      const I64 magnitude = reinterpret_cast<I64>(x) & INT64_MAX;
      if (kOrder == Order::two) {
        sums[i] += x * x;
      } else if (kOrder == Order::one) {
        sums[i] += reinterpret_cast<F64>(magnitude);
      } else {
        most[i] = magnitude > most[i] ? magnitude : most[i];
      }
    }
  });
  double lanes[kStep], sum = 0;
  if (kOrder != Order::inf) {
    std::memcpy(lanes, sums, sizeof lanes);
    for (const double lane : lanes) sum += lane;
    return sum;
  }
  int64_t bits[kStep], result = 0;
  std::memcpy(bits, most, sizeof bits);
  for (const int64_t lane : bits) result = lane > result ? lane : result;
  std::memcpy(&sum, &result, sizeof sum);
  return sum;
}

struct Float64 {};

template <>
double power_sum<Float64>(const char* p, int64_t n, Order order) {
  switch (order) {
    case Order::one: return power_sum_f64<Order::one>(p, n);
    case Order::two: return power_sum_f64<Order::two>(p, n);
    default: return power_sum_f64<Order::inf>(p, n);
  }
}

template <>
void scale<Float64>(char* p, int64_t n, double coef) {
  for_each_step<8, true>(p, n, [&](char* at) __attribute__((always_inline)) {
    CWCLIP_UNROLL for (int i = 0; i < kWideVectors; ++i) {
      const F64 v = load<F64>(at + i * kBytes) * coef;
      std::memcpy(at + i * kBytes, &v, sizeof v);
    }
  });
}

}  // namespace

const Kernels kernels[4] = {
    {power_sum<Float32>, scale<Float32>, {{adamw<Float32, Float32, Float32>}}},
    {power_sum<BFloat16>, scale<BFloat16>,
     {{adamw<BFloat16, BFloat16, BFloat16>, adamw<BFloat16, BFloat16, Float32>},
      {adamw<BFloat16, Float32, BFloat16>, adamw<BFloat16, Float32, Float32>}}},
    {power_sum<Float16>, scale<Float16>,
     {{adamw<Float16, Float16, Float16>, adamw<Float16, Float16, Float32>},
      {adamw<Float16, Float32, Float16>, adamw<Float16, Float32, Float32>}}},
    {power_sum<Float64>, scale<Float64>, {{adamw_f64}}},
};

}  // namespace cwclip::cpu::CWCLIP_ISA
