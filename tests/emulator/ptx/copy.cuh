#pragma once
// A tensor map here: what tensor_map.encode was asked for.
struct alignas(64) TensorMap {
  unsigned long long address;
  long long sizes[3], strides[3];  // batch rows or pages, positions, units; of batch row or page, position and head
  long long heads, columns, box, runs;
  char unused[128 - 11 * 8];
};

inline void copy_16(unsigned to, const void* from) {
  emulator::running->copies.add([there = emulator::at(to), from] { memcpy(there, from, 16); });
}
inline void copy_commit() { emulator::running->copies.commit(); }
template <int PENDING>
void copy_wait() { emulator::running->copies.wait(PENDING); }

// Runs of 64 half-precision channels of `box` positions, whose 16-byte pieces are swapped by the address's bits 7 to 9.
template <bool ONCE>
void box_copy(unsigned to, const TensorMap& map, int channel, int position, int run, int unit, int outer, unsigned barrier) {
  emulator::Block& block = emulator::block();
  const auto copy = [=, &block, &map, issued = races::now()] {
    races::act(issued);
    for (int r = 0; r < map.runs; r++)
      for (int p = 0; p < map.box; p++)
        for (int piece = 0; piece < 8; piece++) {
          const unsigned row = to + (r * map.box + p) * 128, at = row + ((piece ^ row / 128 % 8) * 16);
          const bool inside = position + p < map.sizes[1] && unit < map.sizes[2] && outer < map.sizes[0];
          const unsigned short* from = reinterpret_cast<const unsigned short*>(map.address) + outer * map.strides[0] +
                                       (position + p) * map.strides[1] + unit * map.heads * map.strides[2] + (run + r) * 64 + channel + piece * 8;
          inside ? memcpy(block.shared + at, from, 16) : memset(block.shared + at, 0, 16);
        }
    emulator::MemoryBarrier& b = block.memory_barriers[barrier];
    races::arrive_as(issued, &b);
    b.bytes -= map.box * map.runs * 128;
    emulator::settle(b);
  };
  emulator::boxes.push_back(copy);
}
inline void prefetch_map(const TensorMap&) {}
inline void box_prefetch(const TensorMap&, int, int, int, int, int) {}
