"""How results are shown."""


def line(result):
    return f"{result[1]:.3f}"


def to_json(results, metadata):
    return [{"image": name, "number": number} for name, number in results]


def draw(result, image, out, number, stem, metadata):
    image.save(out / f"{stem}.png")
