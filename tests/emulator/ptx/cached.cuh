#pragma once
#include "ptx/numbers.cuh"
// What is not there: NaN, which a sum would show.

template <class Vector>
Vector load_cached_if(bool exists, const Vector* from) {
  if (exists) return *from;
  Vector x;
  for (float& number : *reinterpret_cast<float(*)[sizeof(Vector) / sizeof(float)]>(&x)) number = quiet_nan();
  return x;
}
