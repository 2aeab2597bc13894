#pragma once
// What the copy engine of sm_90 knows of a call's keys and values: the launcher's tensor maps.

#include "ptx/copy.cuh"

struct Maps {
  TensorMap k, v;
};
