#pragma once
// The query rows of an item, and their numbers in the arrays and among the records of a partial result.

#include "schedule.cuh"

struct Record {
  int h, row;
  __device__ explicit Record(int number) : h(number / (TILES * QUERIES)), row(number / QUERIES % TILES * 4 + number % QUERIES) {}
  __device__ static int number(int h, int n, int t) { return (h * TILES + n) * QUERIES + t; }
};

// The rows of an item: number `row` of the block of rows is query row / group of head row % group.
struct Rows {
  const Problem& p;
  int batch, head, first, count;  // head: the first key head; count: rows of a key head that exist

  __device__ Rows(const Problem& p, const Item& item)
      : p(p), batch(item.batch), head(item.unit * HEADS), first(item.block * ROWS) {
    count = min(ROWS, p.q_len * GROUP - first);
  }
  __device__ int query(int row) const { return (first + row) / GROUP; }
  __device__ int query_head(int h, int row) const { return (head + h) * GROUP + (first + row) % GROUP; }
  __device__ long long number(int h, int row) const {
    return (1ll * batch * p.q_len + query(row)) * p.q_heads + query_head(h, row);
  }
  template <class T>
  __device__ T* at(const void* base, const long long (&stride)[3], int h, int row) const {
    if (row >= count) return nullptr;
    return const_cast<T*>(static_cast<const T*>(base)) + batch * stride[0] + query(row) * stride[1] + query_head(h, row) * stride[2];
  }
};
