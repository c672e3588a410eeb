// The backward direction of strip_conv2d for one instruction set (see common/simd.h: this file is
// compiled once for each). Lanes are channels, as in the forward direction: every load is a whole
// cache line, and the gradient of a weight is a vector that sums itself up, lane by lane.
//
// 270 FMAs for each pixel of a vector bind it, two a cycle: 64 make a and r_i again, 39 each make
// dr_i and da, 25 dx, 103 the gradients of weights. So that nothing else does:
//
//  * A pass holds as many sums in registers as fit beside the taps that they share, so that a
//    loaded vector serves some five FMAs (Correlation, Products): the L1 cache could feed one FMA a
//    load, but not while it is being filled.
//  * Only dy, x and da are needed beyond the rows at hand. So the chain of stages goes down the
//    image in bands of few rows, whose 150 vectors a column of pixels stay in the L2 cache:
//
//      x     rows and pixels beyond the band as far as the square reaches
//      a     pixels beyond the block as far as row_i reach
//      dy    rows beyond the band as far as col_i reach
//      dr_i  pixels beyond the block as far as row_i reach
//      da    rows and pixels beyond as far as the square reaches; rows of the band before stay,
//            because dx comes that much later
//
//  * Of 16 pixels' columns, r_i is made, used for the gradient of col_i's weights, and forgotten;
//    dr_i is made from the same rows of dy and used for the gradient of row_i's weights with the
//    same pixels of a: four passes over what is in the L1 cache.
//
// All of these are (pixels, rows), an odd number of vectors from pixel to pixel: even ones would
// crowd a row of pixels into few sets of the L1 cache. Beyond the image they hold zeros.
//
// Wide images are cut into blocks of columns, which compute each other's borders. Blocks leave
// partial sums of weights' gradients, and a second pass adds them in order: the cut and the order
// depend on the shape alone, so results do not depend on the number of threads.

#include "common/scratch.h"
#include "common/simd.h"
#include "strip_conv/cpu/backward_space.h"
#include "strip_conv/cpu/correlation.h"
#include "strip_conv/cpu/kernels.h"
#include "strip_conv/cpu/layout.h"
#include "strip_conv/cpu/products.h"
#include "strip_conv/cpu/small_square_backward.h"

namespace famseg::FAMSEG_ISA {
namespace {

using strip_conv::BranchGradient;

// As many pieces of work, if there are images enough: plenty for all threads, and few partial sums.
constexpr int64_t kPieces = 256;

// What is to be computed.
struct Needs {
  bool x, square_weight, square_bias;
  bool a, dr, da, dy_sum;
};

Needs needs_of(const Problem& p, const Gradients& gradients) {
  Needs needs{};
  needs.square_weight = gradients.square.weight != nullptr;
  needs.square_bias = gradients.square.bias != nullptr;
  needs.da = gradients.dx != nullptr || needs.square_weight || needs.square_bias;
  needs.dr = needs.da;
  for (int64_t i = 0; i < p.branch_count; ++i) {
    const BranchGradient& wanted = gradients.branches[i];
    needs.a = needs.a || wanted.row.weight != nullptr || wanted.col.weight != nullptr;
    needs.dr = needs.dr || wanted.row.weight != nullptr || wanted.row.bias != nullptr;
    needs.dy_sum = needs.dy_sum || wanted.col.bias != nullptr;
  }
  needs.x = needs.a || needs.square_weight;
  return needs;
}

// a, from x.
template <typename T>
void square_stage(const BackwardSpace<T>& s, const Block& block, int64_t rows) {
  const int64_t begin = block.begin(s.border_a);
  Correlation<T> c{};
  c.in = s.x.at(begin - s.reach_square_x, 0);
  c.in_line = s.x.pixel;
  c.weight = s.square.weight;
  c.taps = s.square.height;
  c.kernel_lines = s.square.width;
  c.start = s.square_bias;
  c.out = s.a.at(begin, 0);
  c.out_line = s.a.pixel;
  c.lines = block.end(s.border_a) - begin;
  correlate<1, true>(c, rows);
}

// dr_i of the pixels [begin, end).
template <typename T>
void col_stage(const BackwardSpace<T>& s, const BackwardStrip<T>& strip, int64_t begin, int64_t end,
               int64_t rows) {
  Correlation<T> c{};
  c.in = s.dy.at(begin, s.reach_col - strip.col.height / 2);
  c.in_line = s.dy.pixel;
  c.weight = strip.col.reversed;
  c.taps = strip.col.height;
  c.start = s.zero;
  c.out = strip.dr.at(begin, 0);
  c.out_line = strip.dr.pixel;
  c.lines = end - begin;
  correlate<1>(c, rows);
}

// dr_i of the pixels [begin, end), at most kTile, and their share of the branch's gradients.
template <typename T>
void strip_stage(const BackwardSpace<T>& s, const BackwardStrip<T>& strip,
                 const BranchGradient& wanted, bool gradient, int64_t begin, int64_t end,
                 int64_t rows) {
  constexpr int64_t lanes = kLanes<T>;
  if (wanted.col.weight != nullptr) {
    Correlation<T> c{};
    c.in = s.a.at(begin - strip.row.width / 2, 0);
    c.in_line = lanes;
    c.weight = strip.row.weight;
    c.taps = strip.row.width;
    c.start = strip.row_bias;
    c.out = s.r.first;
    c.out_line = lanes;
    c.lines = rows;
    correlate<kPitch>(c, end - begin);

    // Tap t of a column meets dy t rows further up: from the last tap to the first.
    Products<T> p{};
    p.gradient = s.r.first;
    p.gradient_line = s.r.pixel;
    p.in = s.dy.at(begin, s.reach_col - strip.col.height / 2);
    p.in_line = s.dy.pixel;
    p.out = s.sum + (strip.col_sums + strip.col.height - 1) * lanes;
    p.out_step = -lanes;
    p.taps = strip.col.height;
    p.length = rows;
    p.lines = end - begin;
    multiply<1>(p);
  }
  if (!gradient) return;
  col_stage(s, strip, begin, end, rows);
  if (wanted.row.weight != nullptr) {
    Products<T> p{};
    p.gradient = strip.dr.at(begin, 0);
    p.gradient_line = lanes;
    p.in = s.a.at(begin - strip.row.width / 2, 0);
    p.in_line = lanes;
    p.out = s.sum + strip.row_sums * lanes;
    p.out_step = lanes;
    p.taps = strip.row.width;
    p.length = end - begin;
    p.lines = rows;
    multiply<kPitch>(p);
  }
  if (wanted.row.bias != nullptr) {
    add_up(strip.dr.at(begin, 0), lanes, strip.dr.pixel, rows, end - begin,
           s.sum + strip.row_bias_sums * lanes);
  }
}

// da, from dy and all dr_i.
template <typename T>
void row_stage(const BackwardSpace<T>& s, const Block& block, int64_t rows) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t begin = block.begin(s.border_da), end = block.end(s.border_da);
  const int64_t before = 2 * s.reach_square_y;
  // Half the rows at a time: then what two neighbouring runs read is still in the L1 cache.
  constexpr int64_t half = kBand / 2;
  for (int64_t row = 0; row < rows; row += half) {
    for (int64_t j = begin; j < end; j += kTile) {
      const int64_t width = min(kTile, end - j);
      Correlation<T> c{};
      c.in_line = lanes;
      c.start = s.dy.at(j, s.reach_col + row);
      c.start_step = s.dy.pixel;
      c.start_line = lanes;
      c.out = s.r.first;
      c.out_line = lanes;
      c.lines = min(half, rows - row);
      for (int64_t i = 0; i < s.branch_count; ++i) {
        const BackwardStrip<T>& strip = s.strips[i];
        c.in = strip.dr.at(j - strip.row.width / 2, row);
        c.weight = strip.row.reversed;
        c.taps = strip.row.width;
        correlate<kPitch>(c, width);
        c.start = c.out;
        c.start_step = s.r.pixel;
      }
      for (int64_t k = 0; k < width; ++k) {
        move_down(c.start + k * c.start_step, c.lines * lanes, s.da.at(j + k, before + row));
      }
    }
  }
}

// The square kernel's gradient, from da and x.
template <typename T>
void square_products(const BackwardSpace<T>& s, const Block& block, int64_t rows) {
  constexpr int64_t lanes = kLanes<T>;
  Products<T> p{};
  p.gradient = s.da.at(0, 2 * s.reach_square_y);
  p.gradient_line = s.da.pixel;
  p.in = s.x.at(-s.reach_square_x, 0);
  p.in_line = s.x.pixel;
  p.out = s.sum + s.square_sums * lanes;
  p.out_step = s.square.width * lanes;
  p.out_line = lanes;
  p.taps = s.square.height;
  p.length = rows;
  p.lines = block.width;
  multiply_square(p, s.square.width);
}

// dx, `rows` rows of the image from row `row` on, from da, whose row `at` is the first they need.
template <typename S, typename T>
void store_x_gradient(const Problem& p, const BackwardSpace<T>& s, const Block& block, int64_t row,
                      int64_t rows, int64_t at, S* image) {
  if (p.square.weight == nullptr) {
    store_image(p, block, row, rows, s.da.at(0, at), s.da.pixel, image);
    return;
  }
  for (int64_t done = 0; done < rows; done += kBand) {
    const int64_t some = min(kBand, rows - done);
    Correlation<T> c{};
    c.in = s.da.at(-s.reach_square_x, at + done);
    c.in_line = s.da.pixel;
    c.weight = s.square.reversed;
    c.taps = s.square.height;
    c.kernel_lines = s.square.width;
    c.start = s.zero;
    c.out = s.a.first;  // which is no longer needed
    c.out_line = s.a.pixel;
    c.lines = block.width;
    correlate<1, true>(c, some);
    store_image(p, block, row + done, some, s.a.first, s.a.pixel, image);
  }
}

template <typename S, typename T>
void backward_image(const Problem& p, const Gradients& gradients, const Needs& needs,
                    const BackwardSpace<T>& s, const Block& block) {
  const int64_t reach = s.reach_square_y, reach_col = s.reach_col;
  const int64_t border_x = s.border_a + s.reach_square_x;
  clear_rows(s.da, block.begin(s.border_da), block.end(s.border_da), 0, 2 * reach);
  for (int64_t top = 0, stored = 0; top < p.h; top += kBand) {
    const int64_t rows = min(kBand, p.h - top);
    const bool first = top == 0, last = top + rows == p.h;
    if (needs.x && p.square.weight != nullptr) {
      if (!first) move_rows(s.x, block.begin(border_x), block.end(border_x), 2 * reach);
      const int64_t there = first ? 0 : 2 * reach;
      load_image<S>(p, p.x, p.channels_last, block, border_x, top - reach + there,
                    top + kBand + reach, s.x, there);
      if (needs.a) square_stage(s, block, rows);
    } else if (needs.x) {
      load_image<S>(p, p.x, p.channels_last, block, s.border_a, top, top + rows, s.a, 0);
    }
    if (!first) move_rows(s.dy, block.begin(s.border_r), block.end(s.border_r), 2 * reach_col);
    const int64_t there = first ? 0 : 2 * reach_col;
    load_image<S>(p, gradients.dy, gradients.dy_channels_last, block, s.border_r,
                  top - reach_col + there, top + kBand + reach_col, s.dy, there);
    if (needs.dy_sum) {
      add_up(s.dy.at(0, reach_col), kLanes<T>, s.dy.pixel, rows, block.width,
             s.sum + s.dy_sums * kLanes<T>);
    }
    for (int64_t j = 0; j < block.width; j += kTile) {
      for (int64_t i = 0; i < s.branch_count; ++i) {
        strip_stage(s, s.strips[i], gradients.branches[i], needs.dr, j, min(j + kTile, block.width),
                    rows);
      }
    }
    if (!needs.da) continue;
    for (int64_t i = 0; i < s.branch_count; ++i) {
      col_stage(s, s.strips[i], block.begin(s.border_r), 0, rows);
      col_stage(s, s.strips[i], block.width, block.end(s.border_r), rows);
    }
    if (!first) move_rows(s.da, block.begin(s.border_da), block.end(s.border_da), 2 * reach);
    row_stage(s, block, rows);
    if (last) {
      clear_rows(s.da, block.begin(s.border_da), block.end(s.border_da), 2 * reach + rows,
                 s.da_rows);
    }
    if (needs.square_bias) {
      add_up(s.da.at(0, 2 * reach), kLanes<T>, s.da.pixel, rows, block.width,
             s.sum + s.square_bias_sums * kLanes<T>);
    }
    if (needs.square_weight) square_products(s, block, rows);
    if (gradients.dx == nullptr) continue;
    const int64_t ready = last ? p.h : max(top + kBand - reach, 0);
    store_x_gradient(p, s, block, stored, ready - stored, stored - top + reach,
                     static_cast<S*>(gradients.dx));
    stored = ready;
  }
}

// How the work is cut: pieces are (runs of images, groups of channels, blocks of columns).
struct Cut {
  int64_t groups, blocks, images, runs;  // images of a run
  int64_t pieces() const { return runs * groups * blocks; }
};

template <typename T>
Cut cut_of(const Problem& p, const BackwardSpace<T>& s) {
  Cut cut{};
  cut.groups = groups_of(p, kLanes<T>);
  if (p.n * p.c * p.h * p.w == 0) return cut;
  cut.blocks = s.blocks;
  const int64_t runs = min(p.n, max(kPieces / (cut.groups * cut.blocks), 1));
  cut.images = (p.n + runs - 1) / runs;
  cut.runs = (p.n + cut.images - 1) / cut.images;
  return cut;
}

template <typename S, typename T>
void backward_piece(const Problem& p, const Gradients& gradients, int64_t piece, void* partial,
                    void* scratch) {
  constexpr int64_t lanes = kLanes<T>;
  Arena arena{static_cast<char*>(scratch)};
  const BackwardSpace<T> s = lay_out<T>(p, arena);
  const Cut cut = cut_of(p, s);
  const int64_t left = piece % cut.blocks * s.width;
  const int64_t first = piece / cut.blocks / cut.groups * cut.images;
  const Group channels = group_at<S>(p, piece / cut.blocks % cut.groups);
  Block block{channels, 0, left, min(s.width, p.w - left), p.w};
  load_weights<S>(p, block.channels, s);
  for (int64_t k = 0; k < s.sums * lanes; ++k) s.sum[k] = 0;
  if (cut.blocks > 1) {
    // Another block may have had pixels where this one is beyond the image.
    const auto clear_outside = [&](const Buffer<T>& buffer, int64_t margin, int64_t rows) {
      clear_rows(buffer, -margin, block.begin(margin), 0, rows);
      clear_rows(buffer, block.end(margin), block.width + margin, 0, rows);
    };
    if (p.square.weight != nullptr) {
      clear_outside(s.x, s.border_a + s.reach_square_x, kBand + 2 * s.reach_square_y);
    }
    clear_outside(s.a, s.reach_row, kBand);
    clear_outside(s.da, s.reach_square_x, s.da_rows);
    for (int64_t i = 0; i < s.branch_count; ++i) {
      clear_outside(s.strips[i].dr, s.border_da + s.reach_row, kBand);
    }
  }
  const Needs needs = needs_of(p, gradients);
  for (block.n = first; block.n < min(first + cut.images, p.n); ++block.n) {
    backward_image<S>(p, gradients, needs, s, block);
  }
  T* to = static_cast<T*>(partial);
  for (int64_t k = 0; k < s.sums * lanes; ++k) to[k] = static_cast<T>(s.sum[k]);
}

// ---- sums of all pieces ---------------------------------------------------------------------

template <typename S, typename T>
struct Reduction {
  const Problem& p;
  const Cut& cut;
  const T* partials;
  int64_t sums, position;  // of the group

  // The gradient (C, height, width), of which the taps `first` ... of the partial sums are the
  // middle; the others meet only zeros.
  void reduce(int64_t first, const ReversibleTaps<T>& taps, int64_t height, int64_t width,
              void* gradient) const {
    constexpr int64_t lanes = kLanes<T>;
    if (gradient == nullptr) return;
    const Group channels = group_at<S>(p, position);
    const int64_t top = (height - taps.height) / 2, left = (width - taps.width) / 2;
    const int64_t count = height * width;
    constexpr int64_t some = 64;
    for (int64_t from = 0; from < count; from += some) {
      const int64_t to = min(from + some, count);
      T block[some * lanes] = {};
      for (int64_t t = from; t < to; ++t) {
        const int64_t i = t / width - top, j = t % width - left;
        if (i < 0 || i >= taps.height || j < 0 || j >= taps.width) continue;
        double total[lanes] = {};
        for (int64_t run = 0; run < cut.runs; ++run) {
          for (int64_t k = 0; k < cut.blocks; ++k) {
            const int64_t piece = (run * cut.groups + position) * cut.blocks + k;
            const T* partial = partials + (piece * sums + first + i * taps.width + j) * lanes;
            for (int l = 0; l < lanes; ++l) total[l] += static_cast<double>(partial[l]);
          }
        }
        for (int l = 0; l < lanes; ++l) block[(t - from) * lanes + l] = static_cast<T>(total[l]);
      }
      store_channels_first(block, lanes, count, channels.count, to - from,
                           static_cast<S*>(gradient) + channels.first * count + from);
    }
  }
};

template <typename S, typename T>
void reduce_group(const Problem& p, const Gradients& gradients, int64_t position,
                  const void* partials, void* scratch) {
  Arena arena{static_cast<char*>(scratch)};
  const BackwardSpace<T> s = lay_out<T>(p, arena);
  const Cut cut = cut_of(p, s);
  const Reduction<S, T> sums{p, cut, static_cast<const T*>(partials), s.sums, position};
  const ReversibleTaps<T> one{nullptr, nullptr, 1, 1};
  sums.reduce(s.square_sums, s.square, p.square.size, p.square.size, gradients.square.weight);
  sums.reduce(s.square_bias_sums, one, 1, 1, gradients.square.bias);
  for (int64_t i = 0; i < p.branch_count; ++i) {
    const Branch& branch = p.branches[i];
    const BranchGradient& wanted = gradients.branches[i];
    const BackwardStrip<T>& strip = s.strips[i];
    sums.reduce(strip.row_sums, strip.row, 1, branch.row.size, wanted.row.weight);
    sums.reduce(strip.row_bias_sums, one, 1, 1, wanted.row.bias);
    sums.reduce(strip.col_sums, strip.col, branch.col.size, 1, wanted.col.weight);
    sums.reduce(s.dy_sums, one, 1, 1, wanted.col.bias);
  }
}

// ---- by element type ------------------------------------------------------------------------

strip_conv::BackwardPlan backward_plan(const Problem& p, const Gradients& gradients) {
  return by_dtype(p.dtype, [&](auto element) {
    using T = Compute<decltype(element)>;
    Arena counting;
    if (is_small_square(p, gradients)) {
      small_square_space<T>(p, counting);
      const int64_t sums = p.c * (p.square.size * p.square.size + 1);
      return strip_conv::BackwardPlan{small_square_pieces(p), p.c / kLanes<T>,
                                      static_cast<size_t>(counting.used), sums * sizeof(T)};
    }
    const BackwardSpace<T> s = lay_out<T>(p, counting);
    const Cut cut = cut_of(p, s);
    return strip_conv::BackwardPlan{cut.pieces(), cut.groups, static_cast<size_t>(counting.used),
                                    static_cast<size_t>(s.sums * kVectorBytes)};
  });
}

void backward_piece_any(const Problem& p, const Gradients& gradients, int64_t piece, void* partial,
                        void* scratch) {
  by_dtype(p.dtype, [&](auto element) {
    using S = decltype(element);
    const auto run = is_small_square(p, gradients) ? small_square_gradient_piece<S, Compute<S>>
                                                   : backward_piece<S, Compute<S>>;
    run(p, gradients, piece, partial, scratch);
  });
}

void reduce_group_any(const Problem& p, const Gradients& gradients, int64_t group,
                      const void* partials, void* scratch) {
  by_dtype(p.dtype, [&](auto element) {
    using S = decltype(element);
    if (is_small_square(p, gradients)) {
      reduce_small_square<S, Compute<S>>(p, gradients, group, partials);
    } else {
      reduce_group<S, Compute<S>>(p, gradients, group, partials, scratch);
    }
  });
}

}  // namespace

// `extern` because a const object is otherwise local to its file.
extern const strip_conv::BackwardKernels strip_conv_backward_kernels;
const strip_conv::BackwardKernels strip_conv_backward_kernels = {backward_plan, backward_piece_any,
                                                                 reduce_group_any};

}  // namespace famseg::FAMSEG_ISA
