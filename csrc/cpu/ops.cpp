#include "ops.h"

#include "../segments.h"
#include "queue.h"
#include "strided.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <utility>

namespace cwclip::cpu {
namespace {

using torch::headeronly::ScalarType;

DType dtype_of(const Tensor& grad) {
  switch (grad.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    case ScalarType::Double: return DType::f64;
    default: STD_TORCH_CHECK(false, "grads: expected float32, bfloat16, float16 or float64");
  }
}

Layout layout_of(const Tensor& grad, size_t index) {
  if (grad.is_contiguous()) return {};
  return cwclip::layout_of(grad.sizes().data(), grad.strides().data(), grad.dim(), index);
}

const int64_t* numbers_of(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Long && tensor.is_cpu() && tensor.dim() == 1 &&
                      tensor.is_contiguous(),
                  name, ": expected contiguous int64 [n] on the CPU");
  return tensor.const_data_ptr<int64_t>();
}

const double* doubles_of(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Double && tensor.is_cpu() && tensor.is_contiguous(), name,
                  ": expected contiguous float64 on the CPU");
  return tensor.const_data_ptr<double>();
}

// Everything is checked here, before the first byte is written. Gradients that are only measured may share memory.
std::vector<Segment> segments_of(const std::vector<Tensor>& grads, const Tensor& components,
                                 const std::optional<Tensor>& cuts, int64_t count, bool writes) {
  STD_TORCH_CHECK(0 <= count && count <= INT32_MAX, "count: expected a number from 0 to 2^31 - 1, not ", count);
  std::vector<Segment> gradients;
  std::vector<Shape> shapes;
  gradients.reserve(grads.size());
  shapes.reserve(grads.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    const Tensor& grad = grads[i];
    STD_TORCH_CHECK(grad.is_cpu(), "grads[", i, "] is not on the CPU");
    gradients.push_back({grad.mutable_data_ptr(), grad.numel(), dtype_of(grad), 0, layout_of(grad, i)});
    shapes.push_back({grad.sizes().data(), grad.strides().data(), grad.dim()});
  }
  if (writes) check_distinct(gradients);
  Cuts pieces = {numbers_of(components, "components"), components.numel(), nullptr, 0};
  if (cuts.has_value()) {
    pieces.numbers = numbers_of(*cuts, "cuts");
    pieces.length = cuts->numel();
  }
  return cut(std::move(gradients), shapes, pieces, count);
}

Order order_of(double norm_type) {
  STD_TORCH_CHECK(norm_type == 1 || norm_type == 2 || norm_type == HUGE_VAL, "norm_type: expected 1, 2 or inf");
  return norm_type == 1 ? Order::one : norm_type == 2 ? Order::two : Order::inf;
}

// Runs work(i) once on each of torch's threads, i counting them, in one parallel region; on fewer where there is little
// to do for each.
//
// Not on threads of our own: after a backward pass torch's are still spinning, ready at once, and in the way of any
// others. A crew that waits on a condition variable took 0.7 ms longer for 91 MB right after an operator of torch
// (2 cores), and was faster only where torch's threads had gone to sleep.
template <class Work>
void on_all_threads(const Tiles& tiles, const Work& work) {
  constexpr int64_t kBytesPerThread = 512 * 1024;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), tiles.bytes / kBytesPerThread);
  if (threads <= 1) return work(0);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) work(static_cast<int>(i));
  });
}

// For work without an order: each(index) for every tile.
template <class Each>
void for_each_tile(const Tiles& tiles, const Each& each) {
  std::atomic<int64_t> next{0};
  const int64_t count = static_cast<int64_t>(tiles.batches.size()) - 1;
  on_all_threads(tiles, [&](int) {
    for (int64_t batch; (batch = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
      for (int64_t i = tiles.batches[batch]; i < tiles.batches[batch + 1]; ++i) each(i);
    }
  });
}

Tensor to_tensor(const std::vector<double>& values, bool wide) {
  Tensor result = torch::stable::empty({static_cast<int64_t>(values.size())},
                                       wide ? ScalarType::Double : ScalarType::Float);
  if (wide) {
    std::copy(values.begin(), values.end(), result.mutable_data_ptr<double>());
  } else {
    std::transform(values.begin(), values.end(), result.mutable_data_ptr<float>(),
                   [](double v) { return static_cast<float>(v); });
  }
  return result;
}

}  // namespace

std::tuple<Tensor, Tensor> clip_(std::vector<Tensor> grads, Tensor components, std::optional<Tensor> cuts,
                                 int64_t count, Tensor caps, std::optional<Tensor> inverse,
                                 std::optional<Tensor> found_inf, double norm_type, double eps, int64_t nonfinite) {
  STD_TORCH_CHECK(caps.dim() == 0 || (caps.dim() == 1 && caps.numel() == count), "caps: expected shape [] or [", count,
                  "]");
  STD_TORCH_CHECK(0 <= nonfinite && nonfinite <= 2, "nonfinite: expected 0, 1 or 2");
  const Order order = order_of(norm_type);
  const std::vector<Segment> segments = segments_of(grads, components, cuts, count, true);
  const bool wide =
      std::any_of(segments.begin(), segments.end(), [](const Segment& s) { return s.dtype == DType::f64; });
  Rule rule{doubles_of(caps, "caps"), caps.dim(), nullptr, eps, static_cast<NonFinite>(nonfinite), wide};
  if (inverse.has_value()) {
    STD_TORCH_CHECK(inverse->numel() == 1, "inverse: expected one element");
    rule.inverse = doubles_of(*inverse, "inverse");
  }
  if (found_inf.has_value()) {
    STD_TORCH_CHECK(found_inf->numel() == 1 && found_inf->scalar_type() == ScalarType::Float && found_inf->is_cpu(),
                    "found_inf: expected one float32 on the CPU");
  }
  const Tiles tiles(segments, count);
  std::vector<double> norms(count), coefs(count);
  const int threads = std::max(1, static_cast<int>(torch::stable::get_num_threads()));
  ClipQueue queue(segments, tiles, order, rule, norms.data(), coefs.data(), threads);
  on_all_threads(tiles, [&](int thread) { queue.work(thread); });
  if (found_inf.has_value() && queue.found_nonfinite()) *found_inf->mutable_data_ptr<float>() = 1;
  return {to_tensor(norms, wide), to_tensor(coefs, wide)};
}

Tensor power_sums(std::vector<Tensor> grads, Tensor components, std::optional<Tensor> cuts, int64_t count,
                  double norm_type) {
  const Order order = order_of(norm_type);
  const std::vector<Segment> segments = segments_of(grads, components, cuts, count, false);
  const Tiles tiles(segments, count);
  std::vector<double> partials(tiles.tiles.size()), sums(count);
  for_each_tile(tiles, [&](int64_t i) {
    const Tile& tile = tiles.tiles[i];
    partials[i] = power_sum(segments[tile.segment], tile.start, tile.count, order);
  });
  for (int64_t c = 0; c < count; ++c) {
    sums[c] = combine(partials.data() + tiles.first[c], tiles.first[c + 1] - tiles.first[c], order);
  }
  return to_tensor(sums, true);
}

void scale_(std::vector<Tensor> grads, Tensor components, std::optional<Tensor> cuts, Tensor coefs, bool zero_fill) {
  const double* factors = doubles_of(coefs, "coefs");
  const std::vector<Segment> segments = segments_of(grads, components, cuts, coefs.numel(), true);
  const Tiles tiles(segments, coefs.numel());
  for_each_tile(tiles, [&](int64_t i) {
    const Tile& tile = tiles.tiles[i];
    const double coef = factors[tile.component];
    if (coef == 1) return;
    scale(segments[tile.segment], tile.start, tile.count, coef, zero_fill && coef == 0);
  });
}

}  // namespace cwclip::cpu
