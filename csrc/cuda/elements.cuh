// A team's threads on the elements of one tile: power sums, and scaling. A team is all workers of a block, or one warp.
//
// A dense run is walked in 16-byte steps; the few elements before its first and after its last 16-byte boundary are
// taken one by one. A run with gaps is taken element by element.
#pragma once

#include "device.cuh"
#include "program.h"

namespace cwclip::cuda {

constexpr int kWorkers = kLanes * kWorkerWarps;
constexpr int kSumLoads = 8;    // 16-byte loads of one thread in flight
constexpr int kScaleLoads = 4;

// ---------------------------------------------------------------------------------------------------------------------
// Elements of each type
// ---------------------------------------------------------------------------------------------------------------------

template <DType>
struct Element;

template <>
struct Element<DType::f32> {
  using Stored = uint32_t;
  using Wide = float;
  CWCLIP_DEVICE static Wide widen(Stored bits) { return float_of(bits); }
  CWCLIP_DEVICE static Stored narrow(Wide x) { return bits_of(x); }
  template <class Each>
  CWCLIP_DEVICE static void for_each(uint32_t word, Each&& each) {
    each(0, float_of(word));
  }
  template <class Map>
  CWCLIP_DEVICE static uint32_t map(uint32_t word, Map&& map) {
    return bits_of(map(float_of(word)));
  }
  static constexpr uint32_t kMagnitude = 0x7fffffffu;
};

template <>
struct Element<DType::bf16> {
  using Stored = uint16_t;
  using Wide = float;
  CWCLIP_DEVICE static Wide widen(Stored bits) { return float_of(static_cast<uint32_t>(bits) << 16); }
  CWCLIP_DEVICE static Stored narrow(Wide x) { return static_cast<Stored>(pack_bf16(x, x)); }
  template <class Each>
  CWCLIP_DEVICE static void for_each(uint32_t word, Each&& each) {
    each(0, float_of(word << 16));
    each(1, float_of(word & 0xffff0000u));
  }
  template <class Map>
  CWCLIP_DEVICE static uint32_t map(uint32_t word, Map&& map) {
    return pack_bf16(map(float_of(word << 16)), map(float_of(word & 0xffff0000u)));
  }
  static constexpr uint32_t kMagnitude = 0x7fff7fffu;
};

template <>
struct Element<DType::f16> {
  using Stored = uint16_t;
  using Wide = float;
  CWCLIP_DEVICE static Wide widen(Stored bits) { return float_of_f16(bits); }
  CWCLIP_DEVICE static Stored narrow(Wide x) { return static_cast<Stored>(pack_f16(x, x)); }
  template <class Each>
  CWCLIP_DEVICE static void for_each(uint32_t word, Each&& each) {
    each(0, float_of_f16(static_cast<uint16_t>(word)));
    each(1, float_of_f16(static_cast<uint16_t>(word >> 16)));
  }
  template <class Map>
  CWCLIP_DEVICE static uint32_t map(uint32_t word, Map&& map) {
    return pack_f16(map(float_of_f16(static_cast<uint16_t>(word))),
                    map(float_of_f16(static_cast<uint16_t>(word >> 16))));
  }
  static constexpr uint32_t kMagnitude = 0x7fff7fffu;
};

template <>
struct Element<DType::f64> {
  using Stored = uint64_t;
  using Wide = double;
  CWCLIP_DEVICE static Wide widen(Stored bits) { return double_of(bits); }
  CWCLIP_DEVICE static Stored narrow(Wide x) { return bits_of(x); }
};

CWCLIP_DEVICE uint64_t join(uint32_t low, uint32_t high) { return low | static_cast<uint64_t>(high) << 32; }

// Calls each(lane, value) for every element of a vector; lane counts from 0 in memory order within a word.
template <DType dtype, class Each>
CWCLIP_DEVICE void for_each_element(const Vector& v, Each&& each) {
  if constexpr (dtype == DType::f64) {
    each(0, double_of(join(v.word[0], v.word[1])));
    each(1, double_of(join(v.word[2], v.word[3])));
  } else {
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      Element<dtype>::for_each(v.word[w], [&](int half, float x) { each(dtype == DType::f32 ? w : 2 * w + half, x); });
    }
  }
}

// Applies map to every element of a vector.
template <DType dtype, class Map>
CWCLIP_DEVICE Vector map_elements(const Vector& v, Map&& map) {
  Vector result;
  if constexpr (dtype == DType::f64) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint64_t bits = bits_of(map(double_of(join(v.word[2 * i], v.word[2 * i + 1]))));
      result.word[2 * i] = static_cast<uint32_t>(bits);
      result.word[2 * i + 1] = static_cast<uint32_t>(bits >> 32);
    }
  } else {
#pragma unroll
    for (int w = 0; w < 4; ++w) result.word[w] = Element<dtype>::map(v.word[w], map);
  }
  return result;
}

// Calls work(std::integral_constant-like tag) with the job's dtype as a compile-time constant.
template <DType value>
struct DTypeTag {
  static constexpr DType dtype = value;
};
template <class Each>
CWCLIP_DEVICE void with_dtype(DType dtype, Each&& work) {
  switch (dtype) {
    case DType::f32: return work(DTypeTag<DType::f32>());
    case DType::bf16: return work(DTypeTag<DType::bf16>());
    case DType::f16: return work(DTypeTag<DType::f16>());
    case DType::f64: return work(DTypeTag<DType::f64>());
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Walking a dense run
// ---------------------------------------------------------------------------------------------------------------------

// Where a dense run's vectors are, and what is left at its ends: `head` elements before them, `edges` in all.
template <DType dtype>
struct Run {
  using Stored = typename Element<dtype>::Stored;
  static constexpr int kPerVector = 16 / static_cast<int>(sizeof(Stored));

  CWCLIP_DEVICE Run(void* address, int32_t count) : first(static_cast<Stored*>(address)) {
    const uintptr_t to_boundary = (16 - (reinterpret_cast<uintptr_t>(address) & 15)) & 15;
    head = static_cast<int32_t>(to_boundary / sizeof(Stored));
    head = head < count ? head : count;
    vectors = (count - head) / kPerVector;
    edges = count - vectors * kPerVector;
    body = reinterpret_cast<Vector*>(first + head);
  }

  // The element outside the vectors that thread `thread` takes, for thread < edges: fewer than two vectors' worth.
  CWCLIP_DEVICE Stored* edge(int32_t thread) const {
    return first + (thread < head ? thread : thread + vectors * kPerVector);
  }

  Stored* first;
  Vector* body;
  int32_t head, vectors, edges;
};

// Element i of a layout with gaps, as an offset from the gradient's first: sizes and strides innermost first.
CWCLIP_DEVICE int64_t offset_of(const int64_t* layout, uint64_t i) {
  int64_t offset = layout[0];
  const int64_t dims = layout[1];
  for (int64_t d = 0; d < dims; ++d) {
    const uint64_t size = static_cast<uint64_t>(layout[2 + 2 * d]);
    offset += static_cast<int64_t>(i % size) * layout[3 + 2 * d];
    i /= size;
  }
  return offset;
}

// ---------------------------------------------------------------------------------------------------------------------
// Power sums
// ---------------------------------------------------------------------------------------------------------------------

CWCLIP_DEVICE double magnitude(double x) { return double_of(bits_of(x) & 0x7fffffffffffffffu); }

// Two power sums, or two maxima, as one. Bits of |x| compare as |x| does, with NaN above inf: no maximum drops it.
template <Order order>
CWCLIP_DEVICE double merged(double a, double b) {
  if constexpr (order == Order::inf) {
    return bits_of(a) > bits_of(b) ? a : b;
  } else {
    return a + b;
  }
}

template <Order order>
CWCLIP_DEVICE double with_element(double sum, double x) {
  if constexpr (order == Order::two) {
    return multiply_add(x, x, sum);
  } else {
    return merged<order>(sum, magnitude(x));
  }
}

// How vectors are read that may be read again.
struct Read {
  CWCLIP_DEVICE Vector operator()(const Vector* p) const { return load_vector(p); }
};
struct ReadWithPolicy {
  uint64_t policy;
  CWCLIP_DEVICE Vector operator()(const Vector* p) const { return load_vector(p, policy); }
};

// Which of a dense run's vectors a thread takes at a time: `at`, and then each kTeam further on.
template <int kTeam, DType dtype, class Load>
CWCLIP_DEVICE void load_share(const Run<dtype>& run, int32_t at, const Load& load, Vector (&loads)[kSumLoads]) {
#pragma unroll
  for (int k = 0; k < kSumLoads; ++k) {
    const int32_t i = at + k * kTeam;
    loads[k] = i < run.vectors ? load(run.body + i) : Vector{};
  }
}

// The power sum of a share in float64 from the start, for what float32 can't hold. Reads the vectors once more, so that
// nobody keeps them in registers for its sake.
template <Order order, int kTeam, DType dtype>
CWCLIP_DEVICE double sum_of_share_in_double(const Run<dtype>& run, int32_t at) {
  double total = 0;
#pragma unroll 1
  for (int k = 0; k < kSumLoads && at < run.vectors; ++k, at += kTeam) {
    for_each_element<dtype>(load_vector(run.body + at), [&](int, double x) { total = with_element<order>(total, x); });
  }
  return total;
}

// Float32 sums of up to 8 terms, one for each element of a vector, then added in float64. Their squares fit float32 if
// the sum is finite, and it loses less than 2^-40 of itself to underflow (64 x 2^-150) if it is above 2^-100. What isn't
// trusted, the same thread adds up once more, in float64.
constexpr double kTrustedFrom = 0x1p-100;

template <Order order, int kTeam, DType dtype, class Load>
CWCLIP_DEVICE double sum_of_share(const Run<dtype>& run, int32_t at, const Load& load) {
  Vector loads[kSumLoads];
  load_share<kTeam>(run, at, load, loads);
  double total = 0;
  if constexpr (dtype == DType::f64) {
#pragma unroll
    for (const Vector& v : loads) {
      for_each_element<dtype>(v, [&](int, double x) { total = with_element<order>(total, x); });
    }
  } else if constexpr (order == Order::inf) {
    uint32_t peak = 0;
#pragma unroll
    for (const Vector& v : loads) {
      for_each_element<dtype>(v, [&](int, float x) {
        const uint32_t bits = bits_of(x) & 0x7fffffffu;
        peak = peak > bits ? peak : bits;
      });
    }
    total = float_of(peak);
  } else {
    float sums[Run<dtype>::kPerVector] = {};
    uint32_t any = 0;
#pragma unroll
    for (const Vector& v : loads) {
      for_each_element<dtype>(v, [&](int i, float x) {
        sums[i] = order == Order::two ? multiply_add(x, x, sums[i]) : sums[i] + float_of(bits_of(x) & 0x7fffffffu);
      });
      any |= v.word[0] | v.word[1] | v.word[2] | v.word[3];
    }
#pragma unroll
    for (const float sum : sums) total += sum;
    if constexpr (dtype != DType::f16) {  // whose squares always fit
      const bool underflow = order == Order::two && total < kTrustedFrom && (any & Element<dtype>::kMagnitude) != 0;
      const bool overflow = !(total < static_cast<double>(float_of(0x7f800000u)));
      if (underflow || overflow) total = sum_of_share_in_double<order, kTeam>(run, at);
    }
  }
  return total;
}

// This thread's share of a dense run's power sum.
template <Order order, int kTeam, DType dtype, class Load>
CWCLIP_DEVICE double sum_dense(void* address, int32_t count, int thread, const Load& load) {
  const Run<dtype> run(address, count);
  double total = 0;
#pragma unroll 1
  for (int32_t at = thread; at < run.vectors; at += kTeam * kSumLoads) {
    total = merged<order>(total, sum_of_share<order, kTeam>(run, at, load));
  }
#pragma unroll 1
  for (int32_t i = thread; i < run.edges; i += kTeam) {
    total = with_element<order>(total, Element<dtype>::widen(*run.edge(i)));
  }
  return total;
}

// Likewise of a run with gaps, in float64 from the start.
template <Order order, int kTeam, DType dtype>
CWCLIP_DEVICE double sum_gapped(const void* address, const int64_t* layout, int64_t start, int32_t count, int thread) {
  const auto* first = static_cast<const typename Element<dtype>::Stored*>(address);
  double total = 0;
#pragma unroll 1
  for (int32_t i = thread; i < count; i += kTeam) {
    total = with_element<order>(total, Element<dtype>::widen(first[offset_of(layout, start + i)]));
  }
  return total;
}

// ---------------------------------------------------------------------------------------------------------------------
// Scaling
// ---------------------------------------------------------------------------------------------------------------------

// g <- coef * g, in float32 for the half types; or g <- +0 whatever g is, if erase.
template <class Wide>
CWCLIP_DEVICE Wide scaled(Wide x, Wide coef, bool erase) {
  return erase ? Wide(0) : product(x, coef);
}

template <int kTeam, DType dtype>
CWCLIP_DEVICE void scale_dense(void* address, int32_t count, double coef, bool erase, int thread) {
  using Wide = typename Element<dtype>::Wide;
  const Wide factor = static_cast<Wide>(coef);
  const Run<dtype> run(address, count);
#pragma unroll 1
  for (int32_t at = thread; at < run.vectors; at += kTeam * kScaleLoads) {
    Vector loads[kScaleLoads];
#pragma unroll
    for (int k = 0; k < kScaleLoads; ++k) {
      const int32_t i = at + k * kTeam;
      loads[k] = i < run.vectors ? load_vector_last(run.body + i) : Vector{};
    }
#pragma unroll
    for (int k = 0; k < kScaleLoads; ++k) {
      const int32_t i = at + k * kTeam;
      if (i < run.vectors) {
        const auto scale = [&](Wide x) { return scaled(x, factor, erase); };
        store_vector_last(run.body + i, map_elements<dtype>(loads[k], scale));
      }
    }
  }
#pragma unroll 1
  for (int32_t i = thread; i < run.edges; i += kTeam) {
    auto* element = run.edge(i);
    *element = Element<dtype>::narrow(scaled(Element<dtype>::widen(*element), factor, erase));
  }
}

template <int kTeam, DType dtype>
CWCLIP_DEVICE void scale_gapped(void* address, const int64_t* layout, int64_t start, int32_t count, double coef,
                                bool erase, int thread) {
  using Wide = typename Element<dtype>::Wide;
  auto* first = static_cast<typename Element<dtype>::Stored*>(address);
#pragma unroll 1
  for (int32_t i = thread; i < count; i += kTeam) {
    auto* element = first + offset_of(layout, start + i);
    *element =
        Element<dtype>::narrow(scaled(Element<dtype>::widen(*element), static_cast<Wide>(coef), erase));
  }
}

}  // namespace cwclip::cuda
