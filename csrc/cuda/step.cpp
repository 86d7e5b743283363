#include "step.h"

#include "program.h"

#include <cstring>

namespace cwclip::cuda {
namespace {

// Where the parts begin, in bytes; targets come first.
struct Places {
  explicit Places(const Program& program)
      : clocks(sizeof(Target) * program.gradient_of.size()),
        numbers(clocks + sizeof(Clock) * static_cast<size_t>(program.gradients)),
        end(numbers + sizeof(Numbers) * static_cast<size_t>(program.gradients)) {}
  size_t clocks, numbers, end;
};

}  // namespace

std::string make_step_table(const Program& program, const Stepped* stepped) {
  const Places places(program);
  std::string table(places.end, '\0');
  for (size_t s = 0; s < program.gradient_of.size(); ++s) {
    const int32_t gradient = program.gradient_of[s];
    const Stepped& own = stepped[gradient];
    const Target target = {own.p, own.m, own.v, own.w, static_cast<DType>(own.parameter), static_cast<DType>(own.state),
                           gradient, 0};
    std::memcpy(&table[s * sizeof target], &target, sizeof target);
  }
  for (int32_t i = 0; i < program.gradients; ++i) {
    const Clock clock = {stepped[i].t, static_cast<int32_t>(stepped[i].rule),
                         static_cast<int32_t>(stepped[i].t_is_double)};
    std::memcpy(&table[places.clocks + static_cast<size_t>(i) * sizeof clock], &clock, sizeof clock);
  }
  return table;
}

Steps steps_at(const Program& program, char* table, const float* skip) {
  const Places places(program);
  return {reinterpret_cast<const Target*>(table), reinterpret_cast<const Clock*>(table + places.clocks),
          reinterpret_cast<Numbers*>(table + places.numbers), skip};
}

}  // namespace cwclip::cuda
