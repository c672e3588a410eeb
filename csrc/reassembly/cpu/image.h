// Tensors in memory, NCHW or NHWC, as images of some channels; and prefetching them.
//
// For kernel files only: see common/simd.h.
#pragma once

#include "reassembly/cpu/geometry.h"

namespace famseg::FAMSEG_ISA {

// Some channels of one image at s times the resolution of x, in NCHW or NHWC.
template <typename S>
struct Image {
  S* at;
  int64_t scale;
  int64_t channel, line, column;  // strides

  bool channels_last() const { return column != 1; }
  // Line dy and column dx of the s x s pixels above pixel (row, 0) of x.
  S* pixel(int64_t row, int64_t dy, int64_t dx) const {
    return at + (row * scale + dy) * line + dx * column;
  }
  Image from_channel(int64_t c) const { return {at + c * channel, scale, channel, line, column}; }
};

template <typename S>
Image<S> image(const Geometry& g, S* tensor, bool channels_last, int64_t scale, int64_t index,
               int64_t channels, int64_t first_channel) {
  const int64_t width = g.width * scale, pixels = g.height * scale * width;
  S* at = tensor + index * channels * pixels;
  if (channels_last) return {at + first_channel, scale, 1, width * channels, channels};
  return {at + first_channel * pixels, scale, pixels, width, 1};
}

// Group `index`, counted through the batch, of x or y (or a gradient), from one of its channels on.
template <typename S>
Image<S> features_image(const Problem& p, const Geometry& g, S* tensor, int64_t scale,
                        int64_t index, int64_t channel) {
  return image(g, tensor, p.x_channels_last, scale, index / p.groups, p.c,
               index % p.groups * g.channels + channel);
}

// The weights (or their gradient) of group `index`, counted through the batch: logits are phases
// next to each other in the channels, masks in the image.
template <typename S>
Image<S> weights_image(const Problem& p, const Geometry& g, S* tensor, int64_t index) {
  const int64_t channels = p.softmax ? g.taps * g.phases : g.taps;
  return image(g, tensor, p.weights_channels_last, p.softmax ? 1 : g.scale, index / p.groups,
               p.groups * channels, index % p.groups * channels);
}

// Asks for memory that is needed soon. Rows of a block are short runs far apart, which the hardware
// does not foresee (about 5 % of the fp32 forward where measured).
template <typename S>
[[gnu::always_inline]] inline void prefetch(const S* line, int64_t count) {
  constexpr int64_t step = kAlignment / static_cast<int64_t>(sizeof(S));
  for (int64_t i = 0; i < count; i += step) __builtin_prefetch(line + i);
}

// A region of the first channel.
template <typename S>
[[gnu::always_inline]] inline void prefetch(Image<S> image, const Region& region) {
  for (int64_t line = 0; line < region.rows * image.scale; ++line) {
    prefetch(image.pixel(region.row, line, region.column * image.scale),
             region.columns * image.scale);
  }
}

// Asks for the memory of a region of some channels bit by bit while `work` is done on others: about
// as fast as it arrives, and no faster than the core can keep in mind.
template <typename S>
class Ahead {
 public:
  Ahead(const Geometry& g, Image<S> image, int64_t channels, const Region& region, int64_t work)
      : work_(work) {
    const int64_t row = max(region.row, 0), column = max(region.column, 0);
    const int64_t lines = (min(region.row + region.rows, g.height) - row) * image.scale;
    const int64_t pixels = (min(region.column + region.columns, g.width) - column) * image.scale;
    line_ = image.pixel(row, 0, column * image.scale);
    if (image.channels_last()) {
      outer_ = {lines, image.line};
      inner_ = {pixels, image.column};
      length_ = channels;
    } else {
      outer_ = {channels, image.channel};
      inner_ = {lines, image.line};
      length_ = pixels;
    }
    total_ = outer_.count * inner_.count * ((length_ + kStep - 1) / kStep);
    left_ = inner_.count;
  }

  // When so much more of the work is done.
  void ask(int64_t done) {
    due_ += done * total_;
    for (; due_ >= work_ && outer_.count > 0; due_ -= work_) {
      __builtin_prefetch(line_ + at_, 0, 2);
      at_ += kStep;
      if (at_ < length_) continue;
      at_ = 0;
      line_ += inner_.stride;
      if (--left_ > 0) continue;
      left_ = inner_.count;
      line_ += outer_.stride - inner_.count * inner_.stride;
      --outer_.count;
    }
  }

 private:
  static constexpr int64_t kStep = kAlignment / static_cast<int64_t>(sizeof(S));
  struct Loop {
    int64_t count, stride;
  };
  S* line_;
  Loop outer_, inner_;
  int64_t length_, total_, work_, left_;
  int64_t at_ = 0, due_ = 0;
};

}  // namespace famseg::FAMSEG_ISA
