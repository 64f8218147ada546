// What a stage works on at a time: part of X, Y or a gradient that stays in the first-level cache.
#pragma once

#include "convert.h"

namespace fastlora::cpu::FASTLORA_ISA {

// A tile, and the columns of S or dS that belong to it. Multiples of 64 elements, which are 8 bytes
// of the mask.
constexpr int64_t kTileRows = 32, kTileColumns = 128, kSlab = 64;
// rows a power of two apart would compete for the same lines of cache
template <class C>
constexpr int64_t kTileStride = kTileColumns + lanes<C>;

// Part of a matrix for products to read or write: the matrix itself where its elements are what
// sums are kept in, else a buffer.
template <class C>
struct Tile {
  C* data;
  int64_t stride;
};

// Whether the elements from a column on are whole vectors as they stand.
template <class T>
inline bool is_wide(const Matrix& X, int64_t width, Mask mask) {
  return std::is_same_v<T, Wide<T>> && !mask.data && X.col_stride == 1 && width % lanes<T> == 0;
}

template <class T>
inline Tile<Wide<T>> own_tile(const Matrix& X, int64_t row, int64_t column) {
  T* data = static_cast<T*>(X.data) + row * X.row_stride + column;
  return {reinterpret_cast<Wide<T>*>(data), X.row_stride};
}

// How a product reads a tile: as vectors along its rows, or an element of every row at a time.
enum class Reads { rows, columns };

// Rows half a page apart share so few lines of the first-level cache that a column of a tile evicts
// another: up to twice the time, measured, of a product that reads columns.
template <class T>
inline bool columns_collide(const Matrix& X) {
  return X.row_stride * int64_t(sizeof(T)) % 2048 == 0;
}

template <class T>
inline Tile<Wide<T>> load_tile(Reads reads, const Matrix& X, int64_t row, int64_t rows,
                               int64_t column, int64_t width, Mask mask, Tile<Wide<T>> buffer) {
  if (is_wide<T>(X, width, mask) && (reads == Reads::rows || !columns_collide<T>(X)))
    return own_tile<T>(X, row, column);
  for (int64_t i = 0; i < rows; ++i)
    load_row<T>(X, row + i, column, width, mask.row(row + i), buffer.data + i * buffer.stride);
  return buffer;
}

template <class T>
inline Tile<Wide<T>> tile_to_fill(const Matrix& Y, int64_t row, int64_t column, int64_t width,
                                  Mask mask, Tile<Wide<T>> buffer) {
  return is_wide<T>(Y, width, mask) ? own_tile<T>(Y, row, column) : buffer;
}

template <class T>
inline void store_tile(Tile<Wide<T>> filled, const Matrix& Y, int64_t row, int64_t rows,
                       int64_t column, int64_t width, Mask mask, bool add = false) {
  if (is_wide<T>(Y, width, mask)) return;
  for (int64_t i = 0; i < rows; ++i)
    store_row<T>(filled.data + i * filled.stride, width, mask.row(row + i), Y, row + i, column,
                 add);
}

}  // namespace fastlora::cpu::FASTLORA_ISA
