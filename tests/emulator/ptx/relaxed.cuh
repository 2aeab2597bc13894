#pragma once
// A thread lets all others go on before it loads a word that another block may store.
inline void store_relaxed(unsigned long long* word, unsigned long long x) { *word = x; }
inline unsigned long long load_relaxed(const unsigned long long* word) {
  emulator::look_again();
  return *word;
}
