"""The names of scores in files, in reports and on the console; needs no PyTorch.

Files use recorded names, `metric` in metrics.jsonl and `Metrics/NAME` in stats.jsonl:

    fid, kid, kid_std, precision, recall, density, coverage, is, is_std
    class_accuracy                                            by a classifier of the data's classes
    frechet_distance, kernel_distance, kernel_distance_std    fid and kid of other features
    bits_per_dim, nats_per_dim                                of images, by likelihood.py
    psnr, ssim, ssim_uniform, rmse, mae                       of images and their truths

Readers see titles, such as FID and pixels Frechet distance. Only the features of the published
Inception weights give an FID or KID, and only those of the published DINOv2 an FD-DINOv2.
"""

SCORES_FILE = "metrics.jsonl"  # in a run or folder, or beside a network
INCEPTION, DINOV2 = "inception", "dinov2"  # the detectors with the published weights
CLASSIFIER = "classifier"  # prefix of the name of a trained classifier; a colon and a hash follow
_NETWORKS = {INCEPTION: "Inception", DINOV2: "DINOv2"}
_GENERAL = {"fid": "frechet_distance", "kid": "kernel_distance", "kid_std": "kernel_distance_std"}
_TITLES = {"fid": "FID", "kid": "KID", "is": "IS", "precision": "precision",
           "recall": "recall", "bits_per_dim": "bits/dim", "nats_per_dim": "nats/dim",
           "psnr": "PSNR", "ssim": "SSIM", "ssim_uniform": "SSIM (uniform window)",
           "rmse": "RMSE", "mae": "MAE"}
_TITLES_OF_FEATURES = {"frechet_distance": "Frechet distance", "kernel_distance": "kernel distance"}
LIKELIHOODS = ("bits_per_dim", "nats_per_dim")
OF_PAIRS = ("psnr", "ssim", "ssim_uniform", "rmse", "mae")
LOWER_IS_BETTER = ("fid", "kid", *_TITLES_OF_FEATURES, *LIKELIHOODS, "rmse", "mae")
HIGHER_IS_BETTER = ("is", "precision", "recall", "density", "coverage", "class_accuracy", "psnr",
                    "ssim", "ssim_uniform")
DISTANCES = ("fid", "frechet_distance")  # the scores by which networks are first compared


def recorded_name(value: str, detector: str) -> str:
    """Returns the recorded name of a metric's value with the features of a detector."""
    return value if detector == INCEPTION else _GENERAL.get(value, value)


def title(metric: str, detector: str) -> str:
    """Returns the title for a recorded name; '' stands for an unknown detector."""
    name = _TITLES_OF_FEATURES.get(metric)
    if name is None:
        return _TITLES.get(metric, metric.replace("_", " "))
    if (metric, detector) == ("frechet_distance", DINOV2):
        return "FD-DINOv2"
    network, colon, _ = detector.partition(":")
    if colon and network in _NETWORKS:
        return f"{name} by other {_NETWORKS[network]} weights"
    if network == CLASSIFIER:
        return f"{CLASSIFIER} {name}"
    return f"{_NETWORKS.get(detector, detector)} {name}".strip()
