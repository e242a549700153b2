"""GPT-2's byte-level alphabet: the character that stands for each of the 256 bytes in a vocabulary."""


def _alphabet() -> dict[str, int]:
    """Printable bytes of Latin-1 stand for themselves, the other 68 are U+0100, U+0101, ... in their order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted({*range(256)} - {*printable})
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


LETTERS = _alphabet()  # character -> byte
