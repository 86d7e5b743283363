// AdamW's update of one contiguous run, four or five streams at once. Included by kernels_isa.h alone.
//
//   g' = factor * g;  m += (1 - beta1) * (g' - m);  v = beta2 * v + (1 - beta2) * g'^2;  w = max(w, v) with amsgrad
//   p = decay * p - size * m / (sqrt(v or w) + eps)
//
// Where beta1 <= 1/2, m = g' - beta1 * (g' - m), the same number, of which rounding leaves g' itself if beta1 = 0.
//
// size and eps have the bias corrections in them (AdamW in kernels.h). Sums, products, quotients and roots are IEEE's,
// each rounded by itself: the same bits for every vector width.

namespace cwclip::cpu::CWCLIP_ISA {
namespace {

CWCLIP_INLINE F32 root_of(F32 x) {
#if CWCLIP_VECTOR_BYTES == 64
  return reinterpret_cast<F32>(_mm512_sqrt_ps(reinterpret_cast<__m512>(x)));
#elif CWCLIP_VECTOR_BYTES == 32
  return reinterpret_cast<F32>(_mm256_sqrt_ps(reinterpret_cast<__m256>(x)));
#elif defined(__SSE2__)
  return reinterpret_cast<F32>(_mm_sqrt_ps(reinterpret_cast<__m128>(x)));
#else
  for (int i = 0; i < kBytes / 4; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

CWCLIP_INLINE F64 root_of(F64 x) {
#if CWCLIP_VECTOR_BYTES == 64
  return reinterpret_cast<F64>(_mm512_sqrt_pd(reinterpret_cast<__m512d>(x)));
#elif CWCLIP_VECTOR_BYTES == 32
  return reinterpret_cast<F64>(_mm256_sqrt_pd(reinterpret_cast<__m256d>(x)));
#elif defined(__SSE2__)
  return reinterpret_cast<F64>(_mm_sqrt_pd(reinterpret_cast<__m128d>(x)));
#else
  for (int i = 0; i < kBytes / 8; ++i) x[i] = __builtin_sqrt(x[i]);
  return x;
#endif
}

// The numbers of a step as vectors of one type.
template <class Vector, class Number>
struct AdamWVectors {
  explicit AdamWVectors(const AdamW& a)
      : factor(Vector{} + static_cast<Number>(a.factor)), decay(Vector{} + static_cast<Number>(a.decay)),
        rate1(Vector{} + static_cast<Number>(a.beta1 > 0.5 ? 1 - a.beta1 : -a.beta1)),
        beta2(Vector{} + static_cast<Number>(a.beta2)), rest2(Vector{} + static_cast<Number>(1 - a.beta2)),
        size(Vector{} + static_cast<Number>(a.size)), eps(Vector{} + static_cast<Number>(a.eps)),
        from_gradient(a.beta1 <= 0.5), erases(a.erases) {}
  const Vector factor, decay, rate1, beta2, rest2, size, eps;
  const bool from_gradient, erases;
};

template <bool kMaximum, class Vector, class Number>
CWCLIP_INLINE void update(Vector& p, Vector g, Vector& m, Vector& v, Vector& w, const AdamWVectors<Vector, Number>& a) {
  g = a.erases ? Vector{} : g * a.factor;
  m = (a.from_gradient ? g : m) + (g - m) * a.rate1;
  v = v * a.beta2 + (g * g) * a.rest2;
  if (kMaximum) w = w > v || w != w ? w : v;  // NaN in either is kept
  p = p * a.decay - (m / (root_of(kMaximum ? w : v) + a.eps)) * a.size;
}

// Calls each(p, g, m, v, w) for runs of kLanes elements, backwards: what was read last, for the norm, is still in cache.
// The elements that don't fill a run come last, in copies padded with zeros, which are copied back.
template <int64_t kLanes, int64_t kP, int64_t kG, int64_t kS, class Each>
CWCLIP_INLINE void for_each_vector(char* p, const char* g, char* m, char* v, char* w, int64_t n, const Each& each) {
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t i = whole - kLanes; i >= 0; i -= kLanes) {
    each(p + i * kP, g + i * kG, m + i * kS, v + i * kS, w == nullptr ? nullptr : w + i * kS);
  }
  if (n == whole) return;
  n -= whole;
  p += whole * kP, g += whole * kG, m += whole * kS, v += whole * kS;
  if (w != nullptr) w += whole * kS;
  char padded[5][kLanes * 8] = {};
  std::memcpy(padded[0], p, n * kP);
  std::memcpy(padded[1], g, n * kG);
  std::memcpy(padded[2], m, n * kS);
  std::memcpy(padded[3], v, n * kS);
  if (w != nullptr) std::memcpy(padded[4], w, n * kS);
  each(padded[0], padded[1], padded[2], padded[3], padded[4]);
  std::memcpy(p, padded[0], n * kP);
  std::memcpy(m, padded[2], n * kS);
  std::memcpy(v, padded[3], n * kS);
  if (w != nullptr) std::memcpy(w, padded[4], n * kS);
}

// P, G and S are the dtypes of parameters, gradients and states.
template <class P, class G, class S, bool kMaximum>
CWCLIP_INLINE void adamw_run(const AdamWRun& run, int64_t n, const AdamW& numbers) {
  const AdamWVectors<F32, float> a(numbers);
  for_each_vector<kBytes / 4, P::kSize, G::kSize, S::kSize>(
      run.p, run.g, run.m, run.v, run.w, n,
      [&](char* p, const char* g, char* m, char* v, char* w) __attribute__((always_inline)) {
        F32 new_p = P::load_lanes(p), new_m = S::load_lanes(m), new_v = S::load_lanes(v), new_w = {};
        if (kMaximum) new_w = S::load_lanes(w);
        update<kMaximum>(new_p, G::load_lanes(g), new_m, new_v, new_w, a);
        P::store_lanes(p, new_p);
        S::store_lanes(m, new_m);
        S::store_lanes(v, new_v);
        if (kMaximum) S::store_lanes(w, new_w);
      });
}

template <class P, class G, class S>
void adamw(const AdamWRun& run, int64_t n, const AdamW& numbers) {
  if (run.w == nullptr) return adamw_run<P, G, S, false>(run, n, numbers);
  adamw_run<P, G, S, true>(run, n, numbers);
}

template <bool kMaximum>
CWCLIP_INLINE void adamw_run_f64(const AdamWRun& run, int64_t n, const AdamW& numbers) {
  const AdamWVectors<F64, double> a(numbers);
  for_each_vector<kBytes / 8, 8, 8, 8>(
      run.p, run.g, run.m, run.v, run.w, n,
      [&](char* p, const char* g, char* m, char* v, char* w) __attribute__((always_inline)) {
        F64 new_p = load<F64>(p), new_m = load<F64>(m), new_v = load<F64>(v), new_w = {};
        if (kMaximum) new_w = load<F64>(w);
        update<kMaximum>(new_p, load<F64>(g), new_m, new_v, new_w, a);
        std::memcpy(p, &new_p, kBytes);
        std::memcpy(m, &new_m, kBytes);
        std::memcpy(v, &new_v, kBytes);
        if (kMaximum) std::memcpy(w, &new_w, kBytes);
      });
}

void adamw_f64(const AdamWRun& run, int64_t n, const AdamW& numbers) {
  if (run.w == nullptr) return adamw_run_f64<false>(run, n, numbers);
  adamw_run_f64<true>(run, n, numbers);
}

}  // namespace
}  // namespace cwclip::cpu::CWCLIP_ISA
