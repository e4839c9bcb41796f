"""Drop ratio over depth (paper, section "how to set the drop ratio"; figure 6)."""

SCHEDULES = ("constant", "decreasing", "increasing")


def ratios(schedule: str, peak: float, end: float, layers: int) -> list[float]:
    """One drop ratio per attention layer, in forward order.

    The paper says that the ratio decreases with depth but not where the ramp ends. Here it is linear,
    d_l = peak + (end - peak) * l / (layers - 1), with end = 0 by default; `increasing` is the mirror image. A single
    layer takes the peak.

    Raises:
        ValueError: an unknown schedule, or ratios outside [0, 1).
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"no schedule '{schedule}'; choose from {', '.join(SCHEDULES)}")
    if not (0 <= peak < 1 and 0 <= end < 1):
        raise ValueError(f"ratios lie in [0, 1): peak={peak}, end={end}")
    if schedule == "constant":
        return [peak] * layers
    depths = [layer / max(layers - 1, 1) for layer in range(layers)]
    decreasing = [peak * (1 - depth) + end * depth for depth in depths]
    return decreasing if schedule == "decreasing" else decreasing[::-1]
