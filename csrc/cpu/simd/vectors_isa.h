// The compiler's own vectors of the width that the instruction set has, and how each dtype is read into them. Included
// by kernels_isa.h alone.

#include <cstring>

#if CWCLIP_VECTOR_BYTES > 16
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

// Only an unrolled loop over vectors keeps them in registers.
#define CWCLIP_UNROLL _Pragma("GCC unroll 16")
#define CWCLIP_INLINE static inline __attribute__((always_inline))

namespace cwclip::cpu::CWCLIP_ISA {
namespace {

constexpr int kBytes = CWCLIP_VECTOR_BYTES;

using F32 = float __attribute__((vector_size(kBytes)));
using I32 = int32_t __attribute__((vector_size(kBytes)));
using F64 = double __attribute__((vector_size(kBytes)));
using I64 = int64_t __attribute__((vector_size(kBytes)));
using HalfF32 = float __attribute__((vector_size(kBytes / 2)));
using Halves = uint16_t __attribute__((vector_size(kBytes / 2)));

constexpr int64_t kStep = 32;
constexpr int kParts = 64 / kBytes;  // vectors for 16 float32 or 8 float64
constexpr int32_t kMagnitude = 0x7fffffff;

template <class Vector>
CWCLIP_INLINE Vector load(const void* p) {
  Vector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

CWCLIP_INLINE I32 bits_of(F32 x) { return reinterpret_cast<I32>(x); }
CWCLIP_INLINE F32 float_of(I32 x) { return reinterpret_cast<F32>(x); }

// Sixteen lanes a and sixteen lanes b, as float32. Which element is in which lane is the same for every vector width.
// Beside steps each dtype has one vector of consecutive elements, load_lanes() and store_lanes().
struct Step {
  F32 a[kParts], b[kParts];
};

struct Float32 {
  static constexpr int64_t kSize = 4;
  CWCLIP_INLINE F32 load_lanes(const char* p) { return load<F32>(p); }
  CWCLIP_INLINE void store_lanes(char* p, F32 value) { std::memcpy(p, &value, sizeof value); }
  CWCLIP_INLINE Step read(const char* p) {
    Step v;
    CWCLIP_UNROLL for (int i = 0; i < kParts; ++i) {
      v.a[i] = load<F32>(p + i * kBytes);
      v.b[i] = load<F32>(p + 64 + i * kBytes);
    }
    return v;
  }
  CWCLIP_INLINE void write(char* p, const Step& v) {
    CWCLIP_UNROLL for (int i = 0; i < kParts; ++i) {
      std::memcpy(p + i * kBytes, &v.a[i], kBytes);
      std::memcpy(p + 64 + i * kBytes, &v.b[i], kBytes);
    }
  }
};

// The upper half of a float32. In a step even elements are lanes a and odd ones lanes b, by a shift or a mask each.
struct BFloat16 {
  static constexpr int64_t kSize = 2;
  CWCLIP_INLINE F32 load_lanes(const char* p) {
    return float_of(__builtin_convertvector(load<Halves>(p), I32) << 16);
  }
  CWCLIP_INLINE void store_lanes(char* p, F32 value) {
    const Halves result = __builtin_convertvector((rounded(value) >> 16) & 0xffff, Halves);
    std::memcpy(p, &result, sizeof result);
  }
  CWCLIP_INLINE Step read(const char* p) {
    Step v;
    CWCLIP_UNROLL for (int i = 0; i < kParts; ++i) {
      const I32 bits = load<I32>(p + i * kBytes);
      v.a[i] = float_of(bits << 16);
      v.b[i] = float_of(bits & ~0xffff);
    }
    return v;
  }
  CWCLIP_INLINE I32 rounded(F32 value) {  // the result in the upper half, anything in the lower
    const I32 bits = bits_of(value);
    return value != value ? I32{} + 0x7fc00000 : bits + 0x7fff + ((bits >> 16) & 1);
  }
  CWCLIP_INLINE void write(char* p, const Step& v) {
    CWCLIP_UNROLL for (int i = 0; i < kParts; ++i) {
      const I32 bits = ((rounded(v.a[i]) >> 16) & 0xffff) | (rounded(v.b[i]) & ~0xffff);
      std::memcpy(p + i * kBytes, &bits, sizeof bits);
    }
  }
};

struct Float16 {
  static constexpr int64_t kSize = 2;
#if CWCLIP_VECTOR_BYTES == 64
  CWCLIP_INLINE F32 load_lanes(const char* p) {
    return reinterpret_cast<F32>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
  }
  CWCLIP_INLINE void store_lanes(char* p, F32 value) {
    const __m256i bits = _mm512_cvtps_ph(reinterpret_cast<__m512>(value), _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bits);
  }
#elif CWCLIP_VECTOR_BYTES == 32
  CWCLIP_INLINE F32 load_lanes(const char* p) {
    return reinterpret_cast<F32>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  CWCLIP_INLINE void store_lanes(char* p, F32 value) {
    const __m128i bits = _mm256_cvtps_ph(reinterpret_cast<__m256>(value), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bits);
  }
#else
  CWCLIP_INLINE F32 load_lanes(const char* p) {
    const I32 bits = __builtin_convertvector(load<Halves>(p), I32);
    const I32 magnitude = bits & 0x7fff, sign = (bits & 0x8000) << 16;
    const I32 normal = (magnitude << 13) + (112 << 23);
    const I32 special = (magnitude << 13) | 0x7f800000;
    // By way of an integer, so that flush-to-zero does not lose it.
    const I32 subnormal = bits_of(__builtin_convertvector(magnitude, F32) * 0x1p-24f);
    const I32 finite = magnitude < 0x0400 ? subnormal : normal;
    return float_of((magnitude >= 0x7c00 ? special : finite) | sign);
  }
  CWCLIP_INLINE void store_lanes(char* p, F32 value) {
    const I32 magnitude = bits_of(value) & kMagnitude, sign = (bits_of(value) >> 16) & 0x8000;
    const I32 normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    // Adding 0.5 moves a subnormal's last place to the last place of the float32 sum, which rounds it.
    const I32 subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000;
    const I32 special = magnitude > 0x7f800000 ? I32{} + 0x7e00 : I32{} + 0x7c00;
    const I32 finite = magnitude < 0x38800000 ? subnormal : normal;
    const Halves result = __builtin_convertvector((magnitude >= 0x477ff000 ? special : finite) | sign, Halves);
    std::memcpy(p, &result, sizeof result);
  }
#endif
  CWCLIP_INLINE Step read(const char* p) {
    Step v;
    CWCLIP_UNROLL for (int i = 0; i < kParts; ++i) {
      v.a[i] = load_lanes(p + i * kBytes / 2);
      v.b[i] = load_lanes(p + 32 + i * kBytes / 2);
    }
    return v;
  }
  CWCLIP_INLINE void write(char* p, const Step& v) {
    CWCLIP_UNROLL for (int i = 0; i < kParts; ++i) {
      store_lanes(p + i * kBytes / 2, v.a[i]);
      store_lanes(p + 32 + i * kBytes / 2, v.b[i]);
    }
  }
};

// Calls each(pointer to a whole step) over n elements, the last ones in a copy padded with zeros, which is copied back
// if `kWrite`.
template <int64_t kSize, bool kWrite, class Each>
CWCLIP_INLINE void for_each_step(char* p, int64_t n, const Each& each) {
  for (; n >= kStep; n -= kStep, p += kStep * kSize) {
    each(p);
  }
  if (n > 0) {
    char padded[kStep * kSize] = {};
    std::memcpy(padded, p, n * kSize);
    each(padded);
    if (kWrite) std::memcpy(p, padded, n * kSize);
  }
}

}  // namespace
}  // namespace cwclip::cpu::CWCLIP_ISA
