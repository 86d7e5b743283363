// An optimizer's step on a GPU: AdamW, from gradients that are clipped in a register and never written.
//
//   g' = coef_c * g;  m <- m + (1 - beta1) (g' - m);  v <- beta2 * v + (1 - beta2) * g'^2;  w <- max(w, v) with amsgrad
//   p <- decay * p - size * m / (sqrt(v or w) + eps)
//
// Launches: Mode::sum (kernels.cuh), if coefficients aren't given; advance_kernel, which advances each gradient's t and
// works out decay, size and eps; step_kernel, one block a tile, which reads g, m, v, p and writes m, v, p. Bytes
// of a float32 parameter: 4 for its norm, and 28, less what L2 still has of its gradient. In float32, or float64 for
// float64; each result is rounded once, where it is written. Deterministic: element by element.
#pragma once

#include "../common/formula.h"
#include "elements.cuh"

#include <type_traits>

namespace cwclip::cuda {

// On a processor: 80 registers, and 98 KB of float32 loads in flight. For compute capability 10 the compiler needs 88.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kStepBlocks = 2;
#else
constexpr int kStepBlocks = 3;
#endif

// ---------------------------------------------------------------------------------------------------------------------
// One element
// ---------------------------------------------------------------------------------------------------------------------

template <class T>
struct Constants {
  CWCLIP_DEVICE Constants(const Numbers& numbers, double coef, bool is_erased)
      : factor(static_cast<T>(numbers.maximize ? -coef : coef)),
        decay(static_cast<T>(numbers.decay)),
        minus_size(static_cast<T>(-numbers.size)),
        eps(static_cast<T>(numbers.eps)),
        rate(static_cast<T>(numbers.rate)),
        beta2(static_cast<T>(numbers.beta2)),
        second(static_cast<T>(numbers.second)),
        erase(is_erased),
        from_gradient(!(numbers.rate > 0)) {}

  T factor, decay, minus_size, eps, rate, beta2, second;
  bool erase, from_gradient;
};

// What is kept for one element.
template <class T>
struct Kept {
  T p, m, v, w;
};

template <bool kMax, class T>
CWCLIP_DEVICE void step_element(T g, Kept<T>& x, const Constants<T>& c) {
  g = scaled(g, c.factor, c.erase);
  x.m = multiply_add(c.rate, g - x.m, c.from_gradient ? g : x.m);
  x.v = multiply_add(product(c.second, g), g, product(c.beta2, x.v));
  if constexpr (kMax) x.w = x.w > x.v || x.w != x.w ? x.w : x.v;  // NaN wins
  const T below = square_root(kMax ? x.w : x.v) + c.eps;
  x.p = multiply_add(c.minus_size, quotient(x.m, below), product(c.decay, x.p));
}

// ---------------------------------------------------------------------------------------------------------------------
// Streams
// ---------------------------------------------------------------------------------------------------------------------

// Neighbouring elements of one tensor: 16 bytes of a wide dtype, as many elements of P if that is a half type.
template <class T>
constexpr int kPerPacket = 16 / static_cast<int>(sizeof(T));

struct Packet {
  uint32_t word[4];  // as in memory; of a half type two words
};

// A tensor's elements from the tile's first on, in a dtype that is P or, where P is a half type, float32. That is looked
// at here: a kernel with code of its own for each combination of dtypes (20) is too large for its registers.
template <DType P>
struct Elements {
  using T = typename Element<P>::Wide;
  using Stored = typename Element<P>::Stored;
  static constexpr bool kHalf = size_of(P) == 2;
  static constexpr int kPer = kPerPacket<T>;

  CWCLIP_DEVICE Elements(char* tensor, DType dtype, int64_t start)
      : at(tensor + start * size_of(dtype)), narrow(kHalf && dtype == P) {}

  CWCLIP_DEVICE bool is_narrow() const { return kHalf && narrow; }

  // Elements before the first one at which a packet can begin.
  CWCLIP_DEVICE int32_t head() const {
    const uint32_t bytes = is_narrow() ? kPer * 2 : 16, past = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(at)) % bytes;
    return static_cast<int32_t>((bytes - past) % bytes * kPer / bytes);
  }

  CWCLIP_DEVICE Packet load(int32_t i) const {
    if (is_narrow()) {
      const HalfVector loaded = load_vector_last(reinterpret_cast<const HalfVector*>(at + int64_t{2} * i));
      return {{loaded.word[0], loaded.word[1], 0, 0}};
    }
    const Vector loaded = load_vector_last(reinterpret_cast<const Vector*>(at + int64_t{sizeof(T)} * i));
    return {{loaded.word[0], loaded.word[1], loaded.word[2], loaded.word[3]}};
  }

  CWCLIP_DEVICE void unpack(const Packet& packet, T (&values)[kPer]) const {
    if constexpr (P == DType::f64) {
      values[0] = double_of(join(packet.word[0], packet.word[1]));
      values[1] = double_of(join(packet.word[2], packet.word[3]));
    } else if (is_narrow()) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        values[k] = Element<P>::widen(static_cast<Stored>(k % 2 == 0 ? packet.word[k / 2] : packet.word[k / 2] >> 16));
      }
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k) values[k] = float_of(packet.word[k]);
    }
  }

  CWCLIP_DEVICE void store(int32_t i, const T (&values)[kPer]) const {
    if constexpr (P == DType::f64) {
      const uint64_t a = bits_of(values[0]), b = bits_of(values[1]);
      store_vector_last(reinterpret_cast<Vector*>(at + int64_t{8} * i),
                        {{static_cast<uint32_t>(a), static_cast<uint32_t>(a >> 32), static_cast<uint32_t>(b),
                          static_cast<uint32_t>(b >> 32)}});
    } else if (is_narrow()) {
      const auto pack = [](float low, float high) {
        return P == DType::bf16 ? pack_bf16(low, high) : pack_f16(low, high);
      };
      store_vector_last(reinterpret_cast<HalfVector*>(at + int64_t{2} * i),
                        HalfVector{{pack(values[0], values[1]), pack(values[2], values[3])}});
    } else {
      store_vector_last(reinterpret_cast<Vector*>(at + int64_t{4} * i),
                        Vector{{bits_of(values[0]), bits_of(values[1]), bits_of(values[2]), bits_of(values[3])}});
    }
  }

  CWCLIP_DEVICE T get(int64_t i) const {
    if constexpr (kHalf) {
      if (!is_narrow()) return reinterpret_cast<const float*>(at)[i];
    }
    return Element<P>::widen(reinterpret_cast<const Stored*>(at)[i]);
  }

  CWCLIP_DEVICE void set(int64_t i, T value) const {
    if constexpr (kHalf) {
      if (!is_narrow()) {
        reinterpret_cast<float*>(at)[i] = value;
        return;
      }
    }
    reinterpret_cast<Stored*>(at)[i] = Element<P>::narrow(value);
  }

  char* const at;
  const bool narrow;
};

// ---------------------------------------------------------------------------------------------------------------------
// A tile
// ---------------------------------------------------------------------------------------------------------------------

template <DType P, bool kMax>
struct SteppedTile {
  using T = typename Element<P>::Wide;
  static constexpr int kPer = kPerPacket<T>;
  static constexpr int kPackets = kMax || P == DType::f64 ? 1 : 2;  // of each stream in flight

  struct Loaded {
    Packet g, p, m, v, w;
  };

  // `start`: its first element; 0 if it has gaps.
  CWCLIP_DEVICE SteppedTile(const Target& target, char* gradient, DType dtype, int64_t start)
      : g(gradient, dtype, start),
        p(target.p, P, start),
        m(target.m, target.state, start),
        v(target.v, target.state, start),
        w(target.w, target.state, start) {}

  CWCLIP_DEVICE Loaded load(int32_t i) const {
    return {g.load(i), p.load(i), m.load(i), v.load(i), kMax ? w.load(i) : Packet{}};
  }

  CWCLIP_DEVICE void step_packet(int32_t i, const Loaded& x, const Constants<T>& constants) const {
    T gs[kPer], ps[kPer], ms[kPer], vs[kPer], ws[kPer];
    g.unpack(x.g, gs);
    p.unpack(x.p, ps);
    m.unpack(x.m, ms);
    v.unpack(x.v, vs);
    if constexpr (kMax) w.unpack(x.w, ws);
#pragma unroll
    for (int k = 0; k < kPer; ++k) {
      Kept<T> kept = {ps[k], ms[k], vs[k], kMax ? ws[k] : T(0)};
      step_element<kMax>(gs[k], kept, constants);
      ps[k] = kept.p;
      ms[k] = kept.m;
      vs[k] = kept.v;
      ws[k] = kept.w;
    }
    p.store(i, ps);
    m.store(i, ms);
    v.store(i, vs);
    if constexpr (kMax) w.store(i, ws);
  }

  CWCLIP_DEVICE void step_one(int64_t i, const Constants<T>& constants) const {
    Kept<T> kept = {p.get(i), m.get(i), v.get(i), T(0)};
    if constexpr (kMax) kept.w = w.get(i);
    step_element<kMax>(g.get(i), kept, constants);
    p.set(i, kept.p);
    m.set(i, kept.m);
    v.set(i, kept.v);
    if constexpr (kMax) w.set(i, kept.w);
  }

  CWCLIP_DEVICE void step_dense(int32_t count, const Constants<T>& constants, int thread) const {
    int32_t head = p.head(), packets = 0;
    const bool alike = g.head() == head && m.head() == head && v.head() == head && (!kMax || w.head() == head);
    if (alike && head < count) packets = (count - head) / kPer;
    for (int32_t at = thread; at < packets; at += kWorkers * kPackets) {
      Loaded loaded[kPackets];
#pragma unroll
      for (int k = 0; k < kPackets; ++k) {
        const int32_t i = at + k * kWorkers;
        loaded[k] = i < packets ? load(head + i * kPer) : Loaded{};
      }
#pragma unroll
      for (int k = 0; k < kPackets; ++k) {
        const int32_t i = at + k * kWorkers;
        if (i < packets) step_packet(head + i * kPer, loaded[k], constants);
      }
    }
    const int32_t inside = packets * kPer;
    for (int32_t i = thread; i < count - inside; i += kWorkers) step_one(i < head ? i : i + inside, constants);
  }

  CWCLIP_DEVICE void step_gapped(const int64_t* layout, int64_t start, int32_t count, const Constants<T>& constants,
                                 int thread) const {
    for (int32_t i = thread; i < count; i += kWorkers) step_one(offset_of(layout, start + i), constants);
  }

  const Elements<P> g, p, m, v, w;
};

// ---------------------------------------------------------------------------------------------------------------------
// Kernels
// ---------------------------------------------------------------------------------------------------------------------

CWCLIP_DEVICE bool is_skipped(const Steps& steps) { return steps.skip != nullptr && !(*steps.skip == 0); }

// t <- t + 1 for every gradient whose rule is among these, and the numbers that follow from it: one thread a gradient.
//
// No tile reads t. This kernel alone reads and writes it, each by one thread of one launch since a gradient has one rule,
// and comes before the tiles on the stream, which read what it has worked out.
CWCLIP_KERNEL void CWCLIP_BOUNDS(kWorkers, 1)
    advance_kernel(CWCLIP_PARAMETER(Steps) steps, CWCLIP_PARAMETER(uint32_t) gradients, CWCLIP_PARAMETER(Rules) rules) {
  if (is_skipped(steps)) return;
  for (uint32_t i = block_index() * kWorkers + thread_index(); i < gradients; i += block_count() * kWorkers) {
    const Clock clock = steps.clocks[i];
    const uint32_t which = static_cast<uint32_t>(clock.rule) - rules.first;
    if (which >= rules.count) continue;
    const AdamWRule& rule = rules.rule[which];
    double t = 0;
    if (clock.is_double) {
      t = *static_cast<double*>(clock.t) += 1;
    } else {
      const double before = *static_cast<float*>(clock.t);
      t = before + 1;
      *static_cast<float*>(clock.t) = static_cast<float>(t);
    }
    double lr = rule.lr;
    if (rule.lr_at != nullptr) {
      lr = rule.lr_is_double ? *static_cast<const double*>(rule.lr_at)
                             : static_cast<double>(*static_cast<const float*>(rule.lr_at));
    }
    Numbers numbers;
    numbers.decay = 1 - product(lr, rule.weight_decay);
    const double first = rule.correct_bias ? 1 - power(rule.beta1, t) : 1;
    const double root = rule.correct_bias ? square_root(1 - power(rule.beta2, t)) : 1;
    numbers.size = lr / first * root;
    numbers.eps = rule.eps * root;
    numbers.rate = rule.beta1 > 0.5 ? 1 - rule.beta1 : -rule.beta1;
    numbers.beta2 = rule.beta2;
    numbers.second = 1 - rule.beta2;
    numbers.maximize = rule.maximize;
    steps.numbers[i] = numbers;
  }
}

template <int kCapacity, bool kGaps>
CWCLIP_KERNEL void CWCLIP_BOUNDS(kWorkers, kGaps ? 2 : kStepBlocks)
    step_kernel(CWCLIP_PARAMETER(Call) call, CWCLIP_PARAMETER(Steps) steps,
                CWCLIP_PARAMETER(Addresses<kCapacity>) addresses) {
  if (is_skipped(steps)) return;
  const Tile tile = call.tables.tiles[call.range.tile_end - 1 - block_index()];  // what was measured last first
  const Target target = steps.targets[tile.segment];
  const double coef = load_result(call.results.coefs, static_cast<uint32_t>(tile.component), call.rule.wide);
  const double factor = product(coef, inverse_of_scale(call.rule));
  const bool erase = coef == 0 && call.rule.nonfinite == NonFinite::zero;
  char* const gradient = static_cast<char*>(addresses.address[tile.segment - call.range.segment_begin]);
  const bool has_gaps = kGaps && tile.layout >= 0;
  const auto step = [&](const auto& elements) {
    using T = typename std::decay_t<decltype(elements)>::T;
    const int thread = hidden(thread_index());
    const Constants<T> constants(steps.numbers[target.gradient], factor, erase);
    if (has_gaps) {
      elements.step_gapped(call.tables.layouts + tile.layout, tile.start, tile.count, constants, thread);
    } else {
      elements.step_dense(tile.count, constants, thread);
    }
  };
  with_dtype(target.parameter, [&](auto tag) {
    constexpr DType P = decltype(tag)::dtype;
    const int64_t start = has_gaps ? 0 : tile.start;
    if (target.w == nullptr) {
      step(SteppedTile<P, false>(target, gradient, tile.dtype, start));
    } else {
      step(SteppedTile<P, true>(target, gradient, tile.dtype, start));
    }
  });
}

}  // namespace cwclip::cuda
