"""Fourier transforms and complex numbers."""

import torch

from tests.proof.registry import grid, operation, operations, spread

fft = torch.fft


def real(z):
    return torch.view_as_real(z.resolve_conj()).flatten(1)


def complex_of(x, a):
    return torch.complex(x, x @ a)


operations(
    rfft=lambda x, a: real(fft.rfft(x @ a)),
    irfft=lambda x, a: fft.irfft(fft.rfft(x) * fft.rfft(x @ a), n=x.shape[1]),
    fft=lambda x, a: real(fft.fft(x @ a)),
    ifft=lambda x, a: fft.ifft(fft.fft(x) * fft.fft(a[0])).real,
    fft2=lambda x, a: real(fft.fft2(spread(x @ a, 3, 4))),
    rfft2=lambda x, a: fft.irfft2(fft.rfft2(spread(x, 4, 4)) * fft.rfft2(spread(x @ a, 4, 4))),
    hfft=lambda x, a: fft.hfft(complex_of(x, a)),
    ihfft=lambda x, a: real(fft.ihfft(x @ a)),
    fftshift=lambda x, a: real(fft.fftshift(fft.fft(x @ a))),
    power_spectrum=lambda x, a: fft.rfft(x @ a).abs().square(),
    amplitude_spectrum=lambda x, a: fft.rfft(spread(x @ a, 6)).abs(),
    phase=lambda x, a: complex_of(2 + x.square(), a).angle(),
    polar=lambda x, a: real(torch.polar(1 + x.square(), x @ a)),
    complex_product=lambda x, a: (complex_of(x, a) * complex_of(x, a.T).conj()).imag,
    complex_matmul=lambda x, a: (complex_of(x, a) @ torch.complex(a, a.T)).abs(),
    complex_exp=lambda x, a: real((1j * complex_of(x, a)).exp()),
    complex_log=lambda x, a: real((2 + complex_of(x, a) / (1 + x.abs() + (x @ a).abs())).log()),
    complex_solve=lambda x, a: torch.linalg.solve(torch.complex(a, 3 * torch.eye(len(a)).double()), x.T + 0j).real.T,
    complex_sgn=lambda x, a: real(torch.sgn(complex_of(x, a))),
    complex_reciprocal=lambda x, a: real((3 + complex_of(x.tanh(), a.tanh())).reciprocal()),
    view_as_complex=lambda x, a: torch.view_as_complex(spread(x @ a, 3, 2)).prod(1).abs(),
    convolution_by_fft=lambda x, a: fft.irfft(fft.rfft(x, n=8) * fft.rfft(a[0], n=8), n=8),
)


@operation
def stft(x, a):
    window = torch.hann_window(4, dtype=x.dtype)
    return torch.stft(spread(x @ a, 8), 4, 2, window=window, return_complex=True).abs().square()


@operation
def istft(x, a):
    window = torch.ones(4, dtype=x.dtype)
    z = torch.stft(spread(x @ a, 8), 4, 2, window=window, return_complex=True)
    return torch.istft(z * grid(3, 1), 4, 2, window=window)
