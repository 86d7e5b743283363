// Tensors with gaps between their elements: brought together a buffer at a time, so that the contiguous kernels
// serve them too and no gradient is ever copied whole.
#pragma once

#include "../common/types.h"
#include "simd/kernels.h"

#include <algorithm>
#include <cstring>

namespace cwclip::cpu {

constexpr int64_t kBufferBytes = 8192;

// Calls visit(pointer to the first, how many) for each run of elements that lie one after another in memory, of elements
// [start, start + n) of a piece in index order.
template <class Visit>
void for_each_run(const Piece& piece, int64_t start, int64_t n, const Visit& visit) {
  const Strides& strides = piece.strides;
  const size_t dims = strides.sizes.size();
  const int64_t width = size_of(piece.dtype);
  // The innermost dimension in one go, if its elements lie one after another; strides are sorted, so only it can.
  const bool in_runs = strides.steps[0] == 1;
  const size_t outer = in_runs ? 1 : 0;
  const int64_t run = in_runs ? strides.sizes[0] : 1;
  int64_t index[kMaxDims];  // no allocation here: nothing may throw while other threads wait
  int64_t offset = 0, rest = start / run;
  for (size_t d = outer; d < dims; ++d) {
    index[d] = rest % strides.sizes[d];
    rest /= strides.sizes[d];
    offset += index[d] * strides.steps[d];
  }
  char* const data = static_cast<char*>(piece.data);
  for (int64_t skipped = start % run; n > 0; skipped = 0) {
    const int64_t count = std::min(run - skipped, n);
    visit(data + (offset + skipped) * width, count);
    n -= count;
    for (size_t d = outer; d < dims; ++d) {
      offset += strides.steps[d];
      if (++index[d] < strides.sizes[d]) break;
      offset -= strides.sizes[d] * strides.steps[d];
      index[d] = 0;
    }
  }
}

// Returns where the copy ends. One element has a path of its own: a call of memcpy would take longer.
inline char* copy(char* to, const char* from, int64_t elements, int64_t width) {
  if (elements == 1 && width == 4) {
    std::memcpy(to, from, 4);
  } else if (elements == 1 && width == 2) {
    std::memcpy(to, from, 2);
  } else {
    std::memcpy(to, from, elements * width);
  }
  return to + elements * width;
}

inline double merge(double a, double b, Order order) {
  if (order != Order::inf) return a + b;
  return a != a || a > b ? a : b;  // NaN stays NaN
}

// power_sum of elements [start, start + n) of any piece.
inline double power_sum(const Piece& piece, int64_t start, int64_t n, Order order) {
  const int64_t width = size_of(piece.dtype);
  if (piece.strides.dense()) {
    return power_sum(static_cast<const char*>(piece.data) + start * width, n, piece.dtype, order);
  }
  alignas(64) char buffer[kBufferBytes];
  const int64_t room = kBufferBytes / width;
  double result = 0;
  for (int64_t done = 0; done < n; done += room) {
    const int64_t count = std::min(room, n - done);
    char* to = buffer;
    for_each_run(piece, start + done, count, [&](const char* from, int64_t elements) {
      to = copy(to, from, elements, width);
    });
    result = merge(result, power_sum(buffer, count, piece.dtype, order), order);
  }
  return result;
}

// g <- coef * g for elements [start, start + n) of any piece; zeros where `fill_zeros`.
inline void scale(const Piece& piece, int64_t start, int64_t n, double coef, bool fill_zeros) {
  const int64_t width = size_of(piece.dtype);
  if (piece.strides.dense()) {
    char* const p = static_cast<char*>(piece.data) + start * width;
    if (fill_zeros) {
      std::memset(p, 0, n * width);
    } else {
      scale(p, n, piece.dtype, coef);
    }
    return;
  }
  alignas(64) char buffer[kBufferBytes];
  const int64_t room = kBufferBytes / width;
  for (int64_t done = 0; done < n; done += room) {
    const int64_t count = std::min(room, n - done);
    char* at = buffer;
    if (fill_zeros) {
      std::memset(buffer, 0, count * width);
    } else {
      for_each_run(piece, start + done, count, [&](const char* from, int64_t elements) {
        at = copy(at, from, elements, width);
      });
      scale(buffer, count, piece.dtype, coef);
    }
    at = buffer;
    for_each_run(piece, start + done, count, [&](char* to, int64_t elements) {
      copy(to, at, elements, width);
      at += elements * width;
    });
  }
}

// AdamW's step of elements [start, start + n) of any piece. `whole` says where the parameter and its state begin, and where
// the piece of the gradient does; all have the gradient's strides.
inline void step(const Piece& piece, int64_t start, int64_t n, const AdamWTypes& types, const AdamWRun& whole,
                 const AdamW& numbers) {
  const int64_t wide = size_of(types.parameter), width = size_of(types.gradient), kept = size_of(types.state);
  const auto moved = [](char* data, int64_t bytes) { return data == nullptr ? nullptr : data + bytes; };
  const auto run_at = [&](int64_t offset) {  // elements from the beginning of the piece
    const int64_t from = piece.offset + offset;
    return AdamWRun{whole.p + from * wide, whole.g + offset * width, whole.m + from * kept, whole.v + from * kept,
                    moved(whole.w, from * kept)};
  };
  if (piece.strides.dense()) return adamw(run_at(start), n, types, numbers);
  alignas(64) char buffers[5][kBufferBytes];
  constexpr int64_t kRoom = kBufferBytes / 8;
  const AdamWRun begin = run_at(0);
  struct Stream {
    char *data, *buffer;
    int64_t width;
    DType dtype;
    bool written;
  };
  const Stream streams[] = {{begin.p, buffers[0], wide, types.parameter, true},
                            {const_cast<char*>(begin.g), buffers[1], width, types.gradient, false},
                            {begin.m, buffers[2], kept, types.state, true},
                            {begin.v, buffers[3], kept, types.state, true},
                            {begin.w, buffers[4], kept, types.state, true}};
  // for_each_run asks a piece for no more than where it begins, its dtype and its strides.
  Piece walked = piece;
  for (int64_t done = 0; done < n; done += kRoom) {
    const int64_t count = std::min(kRoom, n - done);
    for (const Stream& stream : streams) {
      if (stream.data == nullptr) continue;
      char* to = stream.buffer;
      walked.data = stream.data, walked.dtype = stream.dtype;
      for_each_run(walked, start + done, count, [&](const char* from, int64_t elements) {
        to = copy(to, from, elements, stream.width);
      });
    }
    adamw({buffers[0], buffers[1], buffers[2], buffers[3], whole.w == nullptr ? nullptr : buffers[4]}, count, types,
          numbers);
    for (const Stream& stream : streams) {
      if (stream.data == nullptr || !stream.written) continue;
      const char* at = stream.buffer;
      walked.data = stream.data, walked.dtype = stream.dtype;
      for_each_run(walked, start + done, count, [&](char* to, int64_t elements) {
        copy(to, at, elements, stream.width);
        at += elements * stream.width;
      });
    }
  }
}

}  // namespace cwclip::cpu
