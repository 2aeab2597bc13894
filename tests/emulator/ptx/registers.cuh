#pragma once
template <int COUNT>
void take_registers() {}
template <int COUNT>
void give_registers() {}
