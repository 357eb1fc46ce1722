// For units without bf16 dot products and byte expansion, inside their anonymous namespace.

constexpr bool HAS_BF16 = false;

ACK_INLINE const uint8_t *expand8(uint8_t *block, const uint8_t *values, uint64_t mask) {
  return scatter8(block, values, mask);
}

ACK_INLINE const uint8_t *expand16(uint8_t *block, const uint8_t *values, uint32_t mask) {
  return scatter16(block, values, mask);
}
