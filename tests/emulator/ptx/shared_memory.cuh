#pragma once
inline unsigned shared_address(const void* p) { return static_cast<const unsigned char*>(p) - emulator::block().shared; }
inline void fence_async_proxy() {}
inline uint4 shared_load4(unsigned address) { return emulator::whole_at<uint4>(address); }
inline void shared_store4(unsigned address, uint4 x) { emulator::whole_at<uint4>(address) = x; }
