// Between tensors in memory and vectors of channels, which both directions compute with: one vector
// is one pixel of as many channels as it has lanes, missing channels are zero.
//
// For kernel files only: see common/simd.h for why everything lives in famseg::FAMSEG_ISA.
#pragma once

#include "common/half.h"
#include "common/scratch.h"
#include "common/simd.h"
#include "common/transpose.h"
#include "strip_conv/problem.h"

namespace famseg::FAMSEG_ISA {

using strip_conv::Branch;
using strip_conv::Problem;

template <typename T>
struct Taps {
  T* weight = nullptr;  // (height, width) vectors
  int64_t height = 0, width = 0;
};

// Channels of a block of work, one to a lane.
struct Group {
  int64_t first, count;
};

constexpr int64_t kLineBytes = 64;  // of the cache

inline int64_t groups_of(const Problem& p, int64_t lanes) {
  return round_up(p.c, lanes) / lanes;
}

// The channels that come `position`-th. Blocks that follow each other run at the same time. In a
// channels-last image of 16 bits a pixel's cache line holds several groups, and threads that store
// parts of one line take it from each other at every store, which doubled the time of one thread.
// So all first groups of a line come before all second ones.
template <typename S>
Group group_at(const Problem& p, int64_t position) {
  constexpr int64_t lanes = kLanes<Compute<S>>;
  constexpr int64_t shared = max(kLineBytes / (lanes * static_cast<int64_t>(sizeof(S))), 1);
  const int64_t groups = groups_of(p, lanes), lines = groups / shared, more = groups % shared;
  // The last line may be short: the first `more` rounds have a group of it too.
  const int64_t longer = more * (lines + 1);
  const int64_t group =
      position < longer ? position % (lines + 1) * shared + position / (lines + 1)
                        : (position - longer) % lines * shared + more + (position - longer) / lines;
  return {group * lanes, min(lanes, p.c - group * lanes)};
}

// A block of work: some channels and some columns of an image. Pixels are counted from the block's
// first column.
struct Block {
  Group channels;
  int64_t n, left, width;  // the image, and the columns of it
  int64_t image_width;

  // The first pixel, and the one after the last, of what reaches `reach` beyond the block and lies
  // in the image.
  int64_t begin(int64_t reach) const { return max(-reach, -left); }
  int64_t end(int64_t reach) const { return min(width + reach, image_width - left); }

  // Where pixel `column` of row `row` and the first channel lie in a tensor, in elements.
  int64_t offset(const Problem& p, bool channels_last, int64_t row, int64_t column) const {
    if (channels_last) return ((n * p.h + row) * p.w + left + column) * p.c + channels.first;
    return ((n * p.c + channels.first) * p.h + row) * p.w + left + column;
  }
};

// A kernel cropped to the taps that can reach the image: on a 16 x 16 plane 21 taps are as 31, and
// on a single pixel as 1. Cropped taps only ever meet zeros.
inline int64_t cropped(int64_t size, int64_t extent) {
  return min(size, 2 * extent - 1);
}

// `count` pixels of `channels` channels, a vector for each pixel, missing channels zero.
// `pixel` elements from vector to vector; (channels, count) in memory, `stride` elements from
// channel to channel.
template <typename S, typename T>
void load_channels_first(const S* from, int64_t stride, int64_t channels, int64_t count, T* to,
                         int64_t pixel = kLanes<T>) {
  constexpr int lanes = kLanes<T>;
  if (channels == lanes && count >= lanes) {
    for (int64_t j = 0;; j = min(j + lanes, count - lanes)) {
      Vector<T> block[lanes];
#pragma GCC unroll 16
      for (int l = 0; l < lanes; ++l) block[l] = load_wide(from + l * stride + j);
      transpose_from<1, T>(block);
#pragma GCC unroll 16
      for (int k = 0; k < lanes; ++k) store(to + (j + k) * pixel, block[k]);
      if (j == count - lanes) return;
    }
  }
  for (int64_t j = 0; j < count; ++j) {
    for (int64_t l = 0; l < lanes; ++l) {
      to[j * pixel + l] = l < channels ? widen(from[l * stride + j]) : T(0);
    }
  }
}

// The way back, `bias` added to every pixel.
template <typename S, typename T>
void store_channels_first(const T* from, int64_t pixel, int64_t stride, int64_t channels,
                          int64_t count, S* to, Vector<T> bias = Vector<T>{}) {
  constexpr int lanes = kLanes<T>;
  if (channels == lanes && count >= lanes) {
    for (int64_t j = 0;; j = min(j + lanes, count - lanes)) {
      Vector<T> block[lanes];
#pragma GCC unroll 16
      for (int k = 0; k < lanes; ++k) block[k] = load(from + (j + k) * pixel) + bias;
      transpose_from<1, T>(block);
#pragma GCC unroll 16
      for (int l = 0; l < lanes; ++l) store_narrow(to + l * stride + j, block[l]);
      if (j == count - lanes) return;
    }
  }
  for (int64_t l = 0; l < channels; ++l) {
    for (int64_t j = 0; j < count; ++j) narrow(to[l * stride + j], from[j * pixel + l] + bias[l]);
  }
}

// (count, stride) in memory.
template <typename S, typename T>
void load_channels_last(const S* from, int64_t stride, int64_t channels, int64_t count, T* to,
                        int64_t pixel = kLanes<T>) {
  constexpr int lanes = kLanes<T>;
  for (int64_t j = 0; j < count; ++j, from += stride, to += pixel) {
    if (channels == lanes) {
      store(to, load_wide(from));
    } else {
      for (int64_t l = 0; l < lanes; ++l) to[l] = l < channels ? widen(from[l]) : T(0);
    }
  }
}

template <typename S, typename T>
void store_channels_last(const T* from, int64_t pixel, int64_t stride, int64_t channels,
                         int64_t count, S* to, Vector<T> bias = Vector<T>{}) {
  constexpr int lanes = kLanes<T>;
  for (int64_t j = 0; j < count; ++j, from += pixel, to += stride) {
    if (channels == lanes) {
      store_narrow(to, load(from) + bias);
    } else {
      for (int64_t l = 0; l < channels; ++l) narrow(to[l], from[l] + bias[l]);
    }
  }
}

template <typename T>
void clear(T* from, T* to) {
  for (; from < to; from += kLanes<T>) store(from, Vector<T>{});
}

// Whole vectors to a lower address.
template <typename T>
void move_down(const T* from, int64_t elements, T* to) {
  for (int64_t k = 0; k < elements; k += kLanes<T>) store(to + k, load(from + k));
}

// (C, height, width) weights, cropped to the middle.
template <typename S, typename T>
void load_taps(const void* weight, const Group& group, int64_t height, int64_t width,
               const Taps<T>& to) {
  const S* from = static_cast<const S*>(weight) + group.first * height * width +
                  (height - to.height) / 2 * width + (width - to.width) / 2;
  if (to.height == height && to.width == width) {
    load_channels_first(from, height * width, group.count, height * width, to.weight);
    return;
  }
  for (int64_t i = 0; i < to.height; ++i) {
    load_channels_first(from + i * width, height * width, group.count, to.width,
                        to.weight + i * to.width * kLanes<T>);
  }
}

template <typename S, typename T>
Vector<T> bias_of(const void* bias, const Group& group) {
  T lanes[kLanes<T>] = {};
  if (bias != nullptr) {
    load_channels_last(static_cast<const S*>(bias) + group.first, 0, group.count, 1, lanes);
  }
  return load(lanes);
}

}  // namespace famseg::FAMSEG_ISA
