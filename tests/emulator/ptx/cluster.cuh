#pragma once
inline unsigned cluster_rank() { return emulator::running->block; }
// One barrier for the cluster, kept by its first block under a number that no hardware barrier has.
inline emulator::Barrier& cluster_barrier() { return emulator::blocks[0].barriers[-1]; }
inline int cluster_threads() { return emulator::threads_of_a_block * emulator::blocks.size(); }
inline unsigned& cluster_phase() { return emulator::running->cluster_phase; }
inline void cluster_arrive() {
  cluster_phase() = cluster_barrier().phase;
  emulator::arrive(cluster_barrier(), cluster_threads());
}
inline void cluster_arrive_shared() { cluster_arrive(); }
inline void cluster_arrive_relaxed() { cluster_arrive(); }
inline void cluster_wait() {
  emulator::wait_for({&cluster_barrier().phase, cluster_phase()});
  races::pass(&cluster_barrier(), cluster_phase());
}
inline unsigned cluster_address(unsigned address, unsigned rank) { return address + (rank + 1) * emulator::WINDOW; }
inline unsigned cluster_load(unsigned address) { return emulator::whole_at<unsigned>(address); }
inline float2 cluster_load2(unsigned address) { return emulator::whole_at<float2>(address); }
inline float4 cluster_load4(unsigned address) { return emulator::whole_at<float4>(address); }
inline void cluster_store4(unsigned address, float4 x) { emulator::whole_at<float4>(address) = x; }
