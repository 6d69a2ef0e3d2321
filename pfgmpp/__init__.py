"""The mathematics of PFGM++ and EDM, tensors in and tensors out.

kernel       the perturbation kernel of every D in (0, inf], and its posterior mean
schedules    noise levels over time, and grids of them
solvers      Euler, Heun and multistep methods along a grid; churn
few_steps    levels and sampler of networks that take a few evaluations
samplers     from unit-scale latents, or seeds, to images, and back
likelihood   the density of images that a denoiser implies
guidance     a denoiser pushed away from a worse one
measurement  a denoiser of images of which a noisy measurement is known
sizes        images of other sizes than the network was trained on
wrapping     what denoisers around a network share
loss         how noise levels are drawn and weighted; targets
consistency  losses that make a consistency function: tuning and distillation
distillation losses that make a generator by an auxiliary denoiser
augment      images moved at random, and labels that tell the network how
unets        SongUNet (DDPM++, NCSN++) and DhariwalUNet (ADM)
networks     the preconditioners that make denoisers of them
"""
