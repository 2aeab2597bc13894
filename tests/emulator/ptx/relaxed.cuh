#pragma once
// A thread lets all others go on before it loads a word that another block may store.
struct alignas(16) Word16 { unsigned long long first, second; };
template <class Word>
void store_relaxed(Word* word, Word x) { emulator::whole(word) = x; }
inline void store_relaxed(unsigned long long* word, unsigned long long x) { *word = x; }
inline void add_relaxed(unsigned long long* word, unsigned long long x) { *word += x; }
template <class Word>
Word load_relaxed(const Word* word) {
  emulator::look_again();
  return emulator::whole(word);
}
