// For units without an instruction that expands or permutes bytes: the kept elements of a block go
// to their places one by one.

ACK_INLINE const uint8_t *expand8(uint8_t *block, const uint8_t *values, const uint8_t *masks) {
  uint64_t mask;
  __builtin_memcpy(&mask, masks, 8);
  __builtin_memset(block, 128, 64);
  for (; mask; mask &= mask - 1) block[__builtin_ctzll(mask)] = *values++;
  return values;
}

ACK_INLINE const uint8_t *expand16(uint8_t *block, const uint8_t *values, const uint8_t *masks) {
  uint32_t mask;
  __builtin_memcpy(&mask, masks, 4);
  __builtin_memset(block, 0, 64);
  for (; mask; mask &= mask - 1, values += 2)
    __builtin_memcpy(block + 2 * __builtin_ctz(mask), values, 2);
  return values;
}
