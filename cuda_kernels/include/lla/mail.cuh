#pragma once
// Numbers that the blocks of a row send each other while they run, all of them at once on the device. A number travels
// with a tag in one word of 8 bytes, so that no fence and no counter is waited for: it is there when its tag is.
//
// Exchanges of a row are numbered, and take two slots in turn: who sends the one after next has what all others sent next,
// before which they read this one. The tag holds the exchange and how often the row's mail was used. So what lies there from
// before is never taken for what is waited for, whatever the kernel that left it had for a row.
//
// The shape of the kernel comes before this.

#include "ptx/relaxed.cuh"

constexpr int MAIL_WORDS = 3 * 128;  // of a block at a time, at most
constexpr int MOST_EXCHANGES = 128;

struct alignas(128) Mail {
  unsigned long long words[2][SHARERS][MAIL_WORDS];
  unsigned long long added[2][2][ADDED_UP ? 128 : 1];  // of two launches in turn; added.cuh
  unsigned long long uses;
};
static_assert(!TOGETHER || sizeof(Mail) == MAIL_BYTES, "lla.py makes room for another size");

__device__ __forceinline__ Mail* mail_of_row(const lla::Call& call) { return static_cast<Mail*>(call.mail) + item_of_block(call); }

// The tag of exchange 0, of mail that was never used too, which is zero.
__device__ __forceinline__ unsigned first_tag(unsigned long long uses) { return (unsigned(uses) + 1) * MOST_EXCHANGES; }

// By a thread of one block, when all blocks of the row have their tag.
__device__ __forceinline__ void count_use(Mail* mail, unsigned tag) { store_relaxed(&mail->uses, tag / MOST_EXCHANGES); }

// One block's view of its row's mail. tag: of exchange 0.
struct Exchange {
  Mail* mail;
  const Shared& shared;
  unsigned tag;
  int split, blocks;  // of the blocks that share the row

  __device__ __forceinline__ Exchange(const Shared& shared, const lla::Call& call)
      : mail(mail_of_row(call)), shared(shared), tag(shared.tag),
        split(block_of_row(call)), blocks(shared.blocks) {}

  // Where what block `from` sends is found.
  __device__ __forceinline__ const unsigned long long* place(int number, int from, int word) const {
    return &mail->words[number % 2][from][word];
  }

  // To all blocks.
  __device__ __forceinline__ void send(int number, int word, float x) const {
    const unsigned long long tagged = static_cast<unsigned long long>(tag + number) << 32 | __float_as_uint(x);
    store_relaxed(const_cast<unsigned long long*>(place(number, split, word)), tagged);
  }

  // The words at `at`(0) and on, asked for until all have come; 0 where there is none. By whole warps.
  template <int COUNT, class At>
  __device__ __forceinline__ void receive(int number, float (&x)[COUNT], At at) const {
    const unsigned wanted = tag + number;
    bool missing;
    do {
      missing = false;
      unsigned long long found[COUNT];
#pragma unroll
      for (int i = 0; i < COUNT; i++) {
        const unsigned long long* from = at(i);
        found[i] = static_cast<unsigned long long>(wanted) << 32;
        if (!from) continue;
        found[i] = load_relaxed(from);
      }
#pragma unroll
      for (int i = 0; i < COUNT; i++) {
        x[i] = __uint_as_float(static_cast<unsigned>(found[i]));
        missing |= static_cast<unsigned>(found[i] >> 32) != wanted;
      }
      // A warp's lanes go on together.
    } while (__any_sync(~0u, missing));
  }

  // What COUNT blocks from `first` on sent; 0 of those that do not take part.
  template <int COUNT>
  __device__ __forceinline__ void receive(int number, int first, int word, float (&x)[COUNT]) const {
    receive(number, x, [&](int b) { return first + b < blocks ? place(number, first + b, word) : nullptr; });
  }
};
