// What merging does to each block of a weight, on CPU tensors, as operators.

#include <torch/library.h>

#include <algorithm>
#include <functional>
#include <tuple>
#include <vector>

#include "corrections.h"
#include "cpu.h"

namespace fastlora::cpu {
namespace {

// elements of a weight that a thread is woken for; whole pieces of csrc/cpu/merge.h
constexpr int64_t kChunk = 1 << 14;

Tensor add_low_rank(const Tensor& base, const Tensor& left, const Tensor& right,
                    const Tensor& row_scale, const optional<Tensor>& column_scale) {
  check_low_rank(Checks("base", base, at::kCPU), base, left, right, row_scale, column_scale);
  const int64_t n = base.size(0), k = base.size(1), r = left.size(1);
  const Tensor rows = left.contiguous(), columns = pack_rows(right, at::kDouble);
  const Tensor of_rows = row_scale.contiguous();
  optional<Tensor> of_columns;
  if (column_scale) of_columns = pack_rows(*column_scale, at::kDouble);
  Tensor out = at::empty({n, k}, base.options());
  at::parallel_for(0, n, std::max<int64_t>(1, kChunk / std::max<int64_t>(1, k)),
                   [&](int64_t begin, int64_t end) {
                     stages_for(base).add_low_rank(
                         matrix(base), packed(rows), r, packed(columns), of_rows.data_ptr<double>(),
                         of_columns ? of_columns->data_ptr<double>() : nullptr, matrix(out), begin,
                         end);
                   });
  return out;
}

template <class F>
void for_each_chunk(int64_t n, const F& f) {
  at::parallel_for(0, (n + kChunk - 1) / kChunk, 1, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk)
      f(chunk, chunk * kChunk, std::min(n, (chunk + 1) * kChunk));
  });
}

std::tuple<int64_t, Tensor, Tensor, Tensor> encode_correction(const Tensor& predicted,
                                                              const Tensor& exact) {
  check_pair(predicted, exact);
  const int64_t n = exact.numel();
  const Tensor p = predicted.contiguous(), e = exact.contiguous();
  const Stages& stages = stages_for(e);

  std::vector<Outside> outside((n + kChunk - 1) / kChunk);
  for_each_chunk(n, [&](int64_t chunk, int64_t begin, int64_t end) {
    stages.count_distances(p.data_ptr(), e.data_ptr(), begin, end, outside[chunk].data());
  });
  Outside total{};
  for (const Outside& of_chunk : outside)
    for (size_t b = 0; b < total.size(); ++b) total[b] += of_chunk[b];
  const int best = best_width(total, exact);
  const auto integers = exact.options().dtype(integer_type(exact));
  if (best < 0) {
    const Tensor none = at::empty({0}, integers);
    return {-1, none, none, e.is_same(exact) ? e.clone() : e};
  }

  const int bits = kWidths[best];
  std::vector<int64_t> offset(outside.size() + 1);
  for (size_t i = 0; i < outside.size(); ++i) offset[i + 1] = offset[i] + outside[i][best];
  const int64_t escapes = offset.back();
  Tensor codes = at::empty({code_bytes(n, bits)}, exact.options().dtype(at::kByte));
  Tensor escaped = at::empty({escapes}, exact.options().dtype(at::kInt));
  Tensor values = at::empty({escapes}, integers);
  for_each_chunk(n, [&](int64_t chunk, int64_t begin, int64_t end) {
    stages.encode_correction(
        p.data_ptr(), e.data_ptr(), begin, end, bits, codes.data_ptr<uint8_t>(),
        escaped.data_ptr<int32_t>() + offset[chunk],
        static_cast<char*>(values.data_ptr()) + offset[chunk] * values.element_size());
  });
  return {bits, codes, escaped, values};
}

Tensor decode_correction(const Tensor& predicted, int64_t bits, const Tensor& codes,
                         const Tensor& escaped, const Tensor& values) {
  check_correction(predicted, bits, codes, escaped, values);
  const int64_t n = predicted.numel(), escapes = escaped.numel();
  const Tensor p = predicted.contiguous(), c = codes.contiguous();
  const Tensor places = escaped.contiguous(), v = values.contiguous();
  Tensor out = at::empty(predicted.sizes(), predicted.options());
  const int32_t* place = places.data_ptr<int32_t>();
  for_each_chunk(n, [&](int64_t, int64_t begin, int64_t end) {
    // in order of their places
    const int64_t first = std::lower_bound(place, place + escapes, begin) - place;
    const int64_t last = std::lower_bound(place + first, place + escapes, end) - place;
    stages_for(p).decode_correction(
        p.data_ptr(), begin, end, int(bits), c.data_ptr<uint8_t>(), place + first,
        static_cast<const char*>(v.data_ptr()) + first * v.element_size(), last - first,
        out.data_ptr());
  });
  return out;
}

int64_t checksum(const Tensor& weight) {
  const Tensor dense = weight.contiguous();
  const auto sum_of = [&](int64_t begin, int64_t end, uint64_t sum) {
    return sum + stages_for(dense).checksum(dense.data_ptr(), begin, end);
  };
  return int64_t(
      at::parallel_reduce(0, dense.numel(), kChunk, uint64_t(0), sum_of, std::plus<uint64_t>()));
}

}  // namespace

TORCH_LIBRARY_IMPL(fastlora, CPU, m) {
  m.impl("add_low_rank", add_low_rank);
  m.impl("encode_correction", encode_correction);
  m.impl("decode_correction", decode_correction);
  m.impl("checksum", checksum);
}

}  // namespace fastlora::cpu
