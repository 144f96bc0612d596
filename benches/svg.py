"""Line plots as SVG, for results of benchmarks and for the pages in docs."""
import math

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 480, 84, 216, 48, 60


class Axis:
    """Values to pixels, linear or logarithmic."""

    def __init__(self, values, begin, end, log, ticks=None):
        self.begin, self.end, self.scale = begin, end, math.log10 if log else float
        low, high = min(values), max(values)
        if log:
            low, high = (low / 1.25, high * 1.25) if ticks is None else (low, high) if low < high else (low / 2, high * 2)
            marks = (1, 2, 5) if high / low < 1000 else (1,)
            exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            self.ticks = ticks or [t for k in exponents for m in marks if low <= (t := m * 10.0**k) <= high]
        else:
            step = next(s for s in (0.1, 0.2, 0.5, 1, 2, 5, 10) if high / s <= 10)
            low, high = 0, step * math.ceil(1.05 * high / step)
            self.ticks = [step * i for i in range(round(high / step) + 1)]
        self.low, self.high = self.scale(low), self.scale(high)

    def __call__(self, v):
        return self.begin + (self.scale(v) - self.low) / (self.high - self.low) * (self.end - self.begin)


def tick(v):
    return f"{v:g}" if 1e-2 <= v < 1e6 or v == 0 else f"{v:.0e}".replace("e-0", "e-")


def plot(title, x_label, y_label, series, log_x, log_y, x_ticks=None, look=lambda name: (name, "#444", "")):
    """series: (name, points). A line each, its label at its end; look gives label, colour and dashes of a name."""
    series = [(name, sorted(points)) for name, points in series if points]
    if not series:
        return None
    x = Axis([p[0] for _, points in series for p in points], LEFT, WIDTH - RIGHT, log_x, x_ticks)
    y = Axis([p[1] for _, points in series for p in points], HEIGHT - BOTTOM, TOP, log_y)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="13">',
           f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>', f'<text x="{LEFT}" y="26" font-size="16">{title}</text>']
    for v in y.ticks:
        out.append(f'<path d="M{LEFT} {y(v):.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>'
                   f'<text x="{LEFT - 8}" y="{y(v) + 4:.1f}" text-anchor="end">{tick(v)}</text>')
    for v in x.ticks:
        out.append(f'<path d="M{x(v):.1f} {HEIGHT - BOTTOM}v5" stroke="#444"/>'
                   f'<text x="{x(v):.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{tick(v)}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    out.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 16}" text-anchor="middle">{x_label}</text>')
    out.append(f'<text transform="translate({LEFT - 56} {middle}) rotate(-90)" text-anchor="middle">{y_label}</text>')
    lowest = -math.inf
    for name, points in sorted(series, key=lambda s: y(s[1][-1][1])):
        label, colour, dashes = look(name)
        dash = f' stroke-dasharray="{dashes}"' if dashes else ""
        path = "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in points)
        end_x, end_y = x(points[-1][0]), y(points[-1][1])
        lowest = max(end_y, lowest + 14)  # names do not lie upon each other
        out.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.5"{dash}/>'
                   + "".join(f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="3" fill="{colour}"/>' for a, b in points)
                   + f'<path d="M{end_x + 4:.1f} {end_y:.1f}L{WIDTH - RIGHT + 12} {lowest:.1f}" stroke="{colour}" stroke-width="0.5"/>'
                   f'<text x="{WIDTH - RIGHT + 16}" y="{lowest + 4:.1f}" font-size="12" fill="{colour}">{label}</text>' * bool(label))
    return "\n".join([*out, "</svg>"]) + "\n"
