"""Parameters counted by hand from the networks' descriptions."""


def conv(in_chs: int, out_chs: int, kernel_size: int, groups: int = 1) -> int:
    return in_chs * out_chs * kernel_size**2 // groups + out_chs


def conv_norm(in_chs: int, out_chs: int, kernel_size: int, groups: int = 1) -> int:
    """A convolution without bias, and BatchNorm."""
    return in_chs * out_chs * kernel_size**2 // groups + 2 * out_chs


def mlp(chs: int, ratio: float) -> int:
    return conv_norm(chs, int(chs * ratio), 1) + conv_norm(int(chs * ratio), chs, 1)


def recnext_m_block(chs: int, stage: int) -> int:
    return (1 + 5 - stage) * chs * 5**2 + 2 * chs + mlp(chs, 2)  # one shared `down`, a convolution per level and one; norm; MLP


def recnext_a_block(chs: int, stage: int) -> int:
    attention = conv_norm(chs, 2 * chs, 1, groups=2) + conv_norm(chs, chs, 3, groups=chs)
    return 2 * conv_norm(chs, chs, 5, groups=chs) + attention + mlp(chs, 1.875)


def recnext(dims: tuple[int, ...], depths: tuple[int, ...], ratio: float, block) -> int:
    count = conv_norm(3, dims[0] // 2, 3) + conv_norm(dims[0] // 2, dims[0], 3)
    for stage, (chs, depth) in enumerate(zip(dims, depths, strict=True)):
        downsample = conv(dims[stage - 1], chs, 7, groups=dims[stage - 1]) + 2 * chs + mlp(chs, ratio) if stage else 0
        count += downsample + depth * block(chs, stage)
    return count


def lsnet_t() -> int:
    dims, depths = (64, 128, 256, 384), (0, 2, 8, 10)
    count = conv_norm(3, 16, 3) + conv_norm(16, 32, 3) + conv_norm(32, 64, 3)
    for stage, (chs, depth) in enumerate(zip(dims, depths, strict=True)):
        count += conv_norm(dims[stage - 1], dims[stage - 1], 3, dims[stage - 1]) + conv_norm(dims[stage - 1], chs, 1) if stage else 0
        half, num_even = chs // 2, depth // 2
        squeezed = int(chs * 0.25)
        even = conv_norm(chs, chs, 3, chs) + conv_norm(chs, chs, 1, chs) + conv(chs, squeezed, 1) + conv(squeezed, chs, 1)
        perception = conv_norm(chs, half, 1) + conv_norm(half, half, 7, half) + conv_norm(half, half, 1) + conv(half, 9 * chs // 8, 1) + 2 * 9 * chs // 8
        attention = conv_norm(chs, 64 + 64 + chs, 1) + conv_norm(64, 64, 3, 64) + conv_norm(chs, chs, 1) + 4 * 16  # 4 x 4 positions: 16 offsets
        odd = attention if stage == 3 else perception + 2 * chs
        count += num_even * (even + odd) + depth * mlp(chs, 2)
    return count


def pyramid(dims: tuple[int, ...]) -> int:
    return sum(conv(chs, 256, 1) + conv(256, 256, 3) for chs in dims)


SMALL, LARGE, LSNET = (64, 128, 256, 512), (80, 160, 320, 640), (64, 128, 256, 384)
