// From a call to kernels on a stream. The device has to be torch's current one.
#pragma once

#include "program.h"

namespace cwclip::cuda {

enum class Kind : int32_t { power_sums, scale, clip, step, clip_step };

// What the calls that step parameters bring.
struct StepRequest {
  char* table;             // make_step_table
  const AdamWRule* rules;  // not the device's
  size_t count;
  const float* skip;       // see Steps
};

// Everything about one call. Memory is the device's, but for program, addresses and rules.
struct Request {
  Kind kind;
  Order order;
  const Program* program;
  char* const* addresses;  // [program->gradients]
  char* workspace;         // zero, or as the call before on this stream left it
  Results results;
  CallRule rule;
  void* stream;
  StepRequest step;
};

// Says where a program's tables are, before its first call; the reason if its device can't be asked what it is like, or null.
const char* place(Program& program, char* tables, int device);

// Puts the call's kernels on its stream, without waiting; the reason if that fails, or null.
const char* enqueue(const Request& request);

// Why this device can't run the kernels and what to do about it; empty if it can.
std::string find_obstacle(int device);

// A device's stream, as a call needs to know it.
struct StreamState {
  void* handle;
  unsigned long long number;  // its own for the life of the process, but for old drivers; 0 while it is captured
  bool capturing;             // into a graph
};

// Finds the rest from the handle; the reason if that can't be told, or null.
const char* find_state(int device, StreamState* stream);

}  // namespace cwclip::cuda
