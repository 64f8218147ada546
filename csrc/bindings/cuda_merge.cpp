// What merging does to each block of a weight, on CUDA tensors, as operators.

#include <torch/library.h>

#include <tuple>

#include "corrections.h"
#include "cuda.h"
#include "fastlora/merge.h"

namespace fastlora {
namespace {

Tensor add_low_rank(const Tensor& base, const Tensor& left, const Tensor& right,
                    const Tensor& row_scale, const optional<Tensor>& column_scale) {
  const Place at("add_low_rank", "base", base);
  check_low_rank(at.check, base, left, right, row_scale, column_scale);
  const Tensor rows = left.contiguous(), columns = right.contiguous();
  const Tensor of_rows = row_scale.contiguous();
  optional<Tensor> of_columns;
  if (column_scale) of_columns = column_scale->contiguous();
  const Tensor out = at.empty({base.size(0), base.size(1)}, base.scalar_type());
  at.run(0, [&](void*, cudaStream_t stream) {
    return cuda::add_low_rank(matrix(base), rows.data_ptr<double>(), columns.data_ptr<double>(),
                              left.size(1), of_rows.data_ptr<double>(),
                              of_columns ? of_columns->data_ptr<double>() : nullptr, matrix(out),
                              stream);
  });
  return out;
}

// as one row, which a Place wants
Tensor flat(const Tensor& t) { return t.contiguous().view({1, -1}); }

std::tuple<int64_t, Tensor, Tensor, Tensor> encode_correction(const Tensor& predicted,
                                                              const Tensor& exact) {
  check_pair(predicted, exact);
  const Tensor p = flat(predicted), e = flat(exact);
  const Place at("encode_correction", "exact", e);
  const cuda::Dtype dtype = dtype_of(e.scalar_type());
  const int64_t n = e.numel(), chunks = (n + cuda::kChunk - 1) / cuda::kChunk;

  const Tensor outside = at.empty({chunks, int64_t(std::size(kWidths))}, at::kInt);
  at.run(0, [&](void*, cudaStream_t stream) {
    return cuda::count_distances(p.data_ptr(), e.data_ptr(), dtype, n, outside.data_ptr<int32_t>(),
                                 stream);
  });
  const Tensor sums = outside.sum(0, false, at::kLong).cpu();
  Outside total;
  std::copy_n(sums.data_ptr<int64_t>(), total.size(), total.begin());
  const int best = best_width(total, exact);
  if (best < 0) {
    const Tensor none = at.empty({0}, integer_type(exact));
    return {-1, none, none, exact.clone(at::MemoryFormat::Contiguous)};
  }

  const int bits = kWidths[best];
  const Tensor counts = outside.select(1, best);
  const Tensor first = counts.cumsum(0, at::kLong).sub_(counts);
  const Tensor codes = at.empty({code_bytes(n, bits)}, at::kByte);
  const Tensor escaped = at.empty({total[best]}, at::kInt);
  const Tensor values = at.empty({total[best]}, integer_type(exact));
  at.run(0, [&](void*, cudaStream_t stream) {
    return cuda::encode_correction(p.data_ptr(), e.data_ptr(), dtype, n, bits,
                                   first.data_ptr<int64_t>(), codes.data_ptr<uint8_t>(),
                                   escaped.data_ptr<int32_t>(), values.data_ptr(), stream);
  });
  return {bits, codes, escaped, values};
}

Tensor decode_correction(const Tensor& predicted, int64_t bits, const Tensor& codes,
                         const Tensor& escaped, const Tensor& values) {
  check_correction(predicted, bits, codes, escaped, values);
  const Tensor p = flat(predicted), c = codes.contiguous();
  const Tensor places = escaped.contiguous(), v = values.contiguous();
  const Place at("decode_correction", "predicted", p);
  const Tensor out = at.empty(predicted.sizes(), predicted.scalar_type());
  at.run(0, [&](void*, cudaStream_t stream) {
    return cuda::decode_correction(p.data_ptr(), dtype_of(p.scalar_type()), p.numel(), int(bits),
                                   c.data_ptr<uint8_t>(), places.data_ptr<int32_t>(), v.data_ptr(),
                                   v.numel(), out.data_ptr(), stream);
  });
  return out;
}

int64_t checksum(const Tensor& weight) {
  const Tensor row = weight.contiguous().view({1, -1});
  const Place at("checksum", "weight", row);
  const Tensor parts = at.empty({cuda::checksum_parts(row.numel())}, at::kLong);
  at.run(0, [&](void*, cudaStream_t stream) {
    return cuda::checksum(row.data_ptr(), dtype_of(row.scalar_type()), row.numel(),
                          parts.data_ptr<int64_t>(), stream);
  });
  return parts.sum().item<int64_t>();
}

}  // namespace

TORCH_LIBRARY_IMPL(FASTLORA_NAMESPACE, FASTLORA_KEY, m) {
  m.impl("add_low_rank", add_low_rank);
  m.impl("encode_correction", encode_correction);
  m.impl("decode_correction", decode_correction);
  m.impl("checksum", checksum);
}

}  // namespace fastlora
