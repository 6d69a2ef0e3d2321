"""Shows what is in a checkpoint, and converts it to this project's snapshot format."""

import json
import os
from pathlib import Path

import click

from dnnlib.cli import CONTEXT, HELP_NAMES, Range, run, user_errors
from dnnlib.util import json_value

_key_option = click.option(
    "--key", metavar="NAME",
    help="Which network of an IDMD file to use: ema_0_9900, ema_0_9950, ema_0_9990, ema_0_9999, "
         "generator or student.  [default: ema_0_9990]  With --config, the name of the weights.")


@click.group(context_settings=CONTEXT)
def main():
    """Shows the contents of a checkpoint file, or converts it."""


@main.command(context_settings=HELP_NAMES)
@click.argument("source", metavar="FILE|URL")
@_key_option
def show(source, key):
    """Prints the format, network, D, parameters, progress and options of FILE."""
    with user_errors():
        from checkpoints import checkpoint
        content = checkpoint.load(source, key)
        for name, value in _description(content, source).items():
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            click.echo(f"{name + ':':14s} {text}")


def _description(content: dict, source: str) -> dict:
    """Returns the lines of `show` about the content of the file `source`, by name."""
    from checkpoints import checkpoint
    from pfgmpp.few_steps import FewStep
    from pfgmpp.networks import network_D
    from sampling.network_sampler import recorded_scaling
    network = dict(content["network"])
    few_step = network.pop("few_step", None)
    weights = checkpoint.sampling_weights(content)
    D = "not recorded" if not content.get("D_recorded", True) else f"{network_D(network):g}"
    description = {
        "format": f"{content['format']}, version {content.get('version', 'unknown')}",
        "checksum": "verified" if "version" in content else "none in this format",
        "architecture": f"{network.pop('class_name')} of {network.pop('model_type', 'default')}",
        "D": D,
        "parameters": f"{sum(t.numel() for t in weights.values()):,} numbers in "
                      f"{len(weights)} tensors",
        "network": json_value(network),
        "parts": _parts(content),
        "progress": _plain(content.get("progress", {})),
        "options": content.get("options", {}),
    }
    if few_step is not None:
        record = FewStep.from_dict(few_step)
        levels = ", ".join(f"{level:g}" for level in record.levels)
        description["few-step"] = f"{record.method}, at the noise levels {levels}"
    if "keys" in content:
        description["key"] = f"{content['key']}, of {', '.join(content['keys'])}"
    if (level := checkpoint.highest_level(content)) is not None:
        description["sigma_max"] = f"{level:g}, where sampling starts"
    data = content.get("dataset")
    for key, channels in (("scale", "img_channels"), ("cond_scale", "cond_channels")):
        if isinstance(data, dict) and data.get(key) is not None:
            description[key] = str(recorded_scaling(content, source, key,
                                                    content["network"].get(channels, 0)))
    if "dataset" in content:
        description["data"] = data
    if isinstance(origin := content.get("converted_from"), dict):
        description["converted from"] = origin
    return description


def _parts(content: dict) -> str:
    """Returns which networks and optimizer there are, and whether `ema` may be plain weights."""
    origin = content.get("converted_from")
    averaged = origin.get("averaged", True) if isinstance(origin, dict) else True
    doubt = {None: " (not known to be averaged)", False: " (plain weights)"}
    return ", ".join(key + (doubt.get(averaged, "") if key == "ema" else "")
                     for key in ("net", "ema", "optimizer") if content.get(key))


def _plain(value):
    """Returns nested data with tensors as numbers or lists."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return value.tolist() if hasattr(value, "tolist") else value


@main.command(context_settings=HELP_NAMES)
@click.argument("source", metavar="FILE|URL")
@click.argument("dest", metavar="DEST")
@click.option("--config", metavar="JSON",
              help="For a FILE that holds only weights: the training_options.json of their run, "
                   "from this project, EDM or PFGM++.")
@click.option("--pfgmpp", type=click.BOOL,
              help="Whether it was trained as PFGM++, if not recorded.")
@click.option("--aug_dim", metavar="D", type=float,
              help="Augmented dimensions, if not recorded.")
@click.option("--scale", metavar="LO,HI", type=Range(),
              help="Values of its floating-point data that became -1 and 1, if not recorded.")
@click.option("--cond-scale", metavar="LO,HI", type=Range(),
              help="The same for its condition images.")
@click.option("--sigma-max", metavar="FLOAT", type=click.FloatRange(min=0, min_open=True),
              help="Noise level where sampling starts, if not recorded.")
@click.option("--half", is_flag=True, help="Store the weights as float16, in half the space.")
@_key_option
@click.option("--overwrite", is_flag=True, help="Replace DEST if it exists.")
def convert(source, dest, config, pfgmpp, aug_dim, scale, cond_scale, sigma_max, half, key,
            overwrite):
    """Writes the averaged network of FILE as a snapshot, DEST.pt or DEST.safetensors.

    FILE may be a run directory, whose newest network is then converted. With --config, it may hold
    only weights: a state_dict written by torch.save, a safetensors file or a Lightning checkpoint.

    Weights of published checkpoints keep their licence when they are converted.
    """
    with user_errors():
        from checkpoints import checkpoint
        from checkpoints.names import find_network
        from images.scaling import Scaling
        if not dest.endswith((".pt", ".safetensors")):
            raise ValueError(f"{dest}: must end in .pt or .safetensors")
        source = find_network(source)
        if os.path.exists(dest):
            if os.path.exists(source) and os.path.samefile(source, dest):
                raise ValueError(f"{dest}: is the file to convert, which would be lost; name "
                                 "another DEST")
            if not overwrite:
                raise ValueError(f"{dest}: already exists; give --overwrite to replace it")
        content = checkpoint.with_average(checkpoint.load(source, key, config), source)
        for note in content.get("notes", ()):
            click.echo(f"Note: {source}: {note}", err=True)
        content = checkpoint.resolve_D(content, source, pfgmpp, aug_dim)
        content = checkpoint.with_records(
            content, source, scale=scale and Scaling.of_range(*scale),
            cond_scale=cond_scale and Scaling.of_range(*cond_scale), sigma_max=sigma_max)
        if scale and content["network"].get("cond_channels") and \
                "cond_scale" not in content["dataset"]:
            click.echo("Warning: --scale without --cond-scale: condition images must be 8-bit",
                       err=True)
        if content.get("ema") is None:
            click.echo(f"Warning: {source}: has no averaged weights, and there is no "
                       "network-snapshot of the same number beside it; the plain weights are "
                       "written, which give worse samples", err=True)
        snapshot = checkpoint.as_snapshot(checkpoint.with_origin(content, source))
        if half:
            snapshot["ema"] = checkpoint.halved(snapshot["ema"], source)
        Path(dest).parent.mkdir(parents=True, exist_ok=True)
        write = checkpoint.save if dest.endswith(".pt") else checkpoint.save_safetensors
        write(dest, snapshot)
        click.echo(f"{dest}: written")


def cli() -> None:
    """Runs the command; where pip has installed it, the console script."""
    run(main)


if __name__ == "__main__":
    cli()
