// Both forms of the CUDA kernels by themselves, without Python: random gradients, random machines, many calls on one
// workspace, against sums that a child could follow. Built with CWCLIP_BLOCKS_AS_THREADS and ThreadSanitizer.
//
//   hand_over SEED CASES
#include "../../../csrc/cuda/launch.h"
#include "blocks.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

using namespace cwclip;
using namespace cwclip::cuda;

namespace {

std::mt19937_64 random_bits;

int64_t between(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(random_bits); }

#define REQUIRE(condition)                                                     \
  if (!(condition)) {                                                          \
    std::printf("line %d, case %ld: not %s\n", __LINE__, number, #condition); \
    std::exit(1);                                                              \
  }

void one_case(long number) {
  const int64_t components = between(1, 12);
  std::vector<Piece> gradients;
  std::vector<std::vector<float>> values;
  for (int64_t i = between(1, 40); i > 0; --i) {
    const int64_t numel = between(0, 3) == 0 ? between(0, 40000) : between(0, 40);
    std::vector<float>& data = values.emplace_back(static_cast<size_t>(numel + 4));
    for (float& x : data) x = static_cast<float>(between(-1000, 1000)) / 256;
    gradients.push_back({nullptr, numel, DType::f32, static_cast<int32_t>(between(0, components - 1)), {}});
    gradients.back().gradient = static_cast<int32_t>(gradients.size()) - 1;
  }
  std::vector<char*> addresses;
  for (size_t i = 0; i < values.size(); ++i) addresses.push_back(reinterpret_cast<char*>(values[i].data() + between(0, 3)));

  std::string tables;
  Program program = make_program(gradients, static_cast<int32_t>(gradients.size()), components, tables);
  program.tables = tables.data();
  std::vector<uint64_t> workspace(static_cast<size_t>(program.workspace_bytes + 15) / 8);
  std::vector<double> caps(static_cast<size_t>(components));
  std::vector<double> norms(caps.size()), coefs(caps.size());

  for (int call = 0; call < 3; ++call) {
    const int form = static_cast<int>(between(1, 2));
    setenv("CWCLIP_CUDA_FORM", form == 1 ? "1" : "2", 1);
    on_host::machine.processors = static_cast<int>(between(1, 3));
    on_host::machine.resident = static_cast<uint32_t>(between(1, 8));
    on_host::machine.seed = random_bits();
    for (double& cap : caps) cap = between(0, 1) == 0 ? 1e9 : 0.5;

    std::vector<double> sums(caps.size());
    std::vector<std::vector<float>> before = values;
    for (size_t i = 0; i < values.size(); ++i) {
      const float* const x = reinterpret_cast<const float*>(addresses[i]);
      for (int64_t j = 0; j < gradients[i].numel; ++j) sums[static_cast<size_t>(gradients[i].component)] += double{x[j]} * x[j];
    }
    Request request = {};
    request.kind = Kind::clip;
    request.order = Order::two;
    request.program = &program;
    request.addresses = addresses.data();
    request.workspace = reinterpret_cast<char*>(workspace.data());
    request.results = {nullptr, norms.data(), coefs.data(), nullptr};
    request.rule = {caps.data(), 1, nullptr, 1e-6, NonFinite::propagate, true};
    REQUIRE(enqueue(request) == nullptr);

    for (size_t c = 0; c < caps.size(); ++c) {
      REQUIRE(std::abs(norms[c] - std::sqrt(sums[c])) <= 1e-6 * norms[c]);
      REQUIRE(coefs[c] == (norms[c] == 0 || norms[c] + 1e-6 <= caps[c] ? 1 : caps[c] / (norms[c] + 1e-6)));
    }
    for (size_t i = 0; i < values.size(); ++i) {
      const float factor = static_cast<float>(coefs[static_cast<size_t>(gradients[i].component)]);
      const size_t start = static_cast<size_t>(reinterpret_cast<float*>(addresses[i]) - values[i].data());
      for (size_t j = 0; j < values[i].size(); ++j) {
        const bool inside = j >= start && j < start + static_cast<size_t>(gradients[i].numel);
        REQUIRE(values[i][j] == (inside ? before[i][j] * factor : before[i][j]));
      }
    }
    for (int64_t i = 0; i < program.partials_at / 8; ++i) REQUIRE(workspace[static_cast<size_t>(i)] == 0);
  }
}

}  // namespace

int main(int, char** arguments) {
  random_bits.seed(std::strtoull(arguments[1], nullptr, 10));
  const long cases = std::strtol(arguments[2], nullptr, 10);
  for (long number = 0; number < cases; ++number) one_case(number);
  std::printf("%ld cases\n", cases);
}
