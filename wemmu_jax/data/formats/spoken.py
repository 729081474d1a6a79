"""`[{"from": "human", "value": ...}, {"from": "gpt", ...}]`: what UniWorld, LLaVA and ShareGPT have in common."""

from wemmu_jax.data.formats.tar import checked_text
from wemmu_jax.data.records import Turn

IMAGE, DRAWN = "<image>", "<gen_image>"

Spoken = list[tuple[str, str]]  # who, what


def read_spoken(row: dict) -> tuple[list[str], Spoken]:
    """Paths of a row's `image` (or `images`), one, several or none, and its `conversations`.

    Raises:
      ValueError: it has another form, or other numbers of pictures and of placeholders for them.
    """
    images = row.get("image", row.get("images")) or []
    images = [images] if isinstance(images, str) else images
    turns = row.get("conversations")
    if not isinstance(images, list) or not isinstance(turns, list) or not turns:
        raise ValueError("expected 'image', a path or some, and 'conversations', a list")
    said = [(turn.get("from"), turn.get("value")) for turn in turns if isinstance(turn, dict)]
    if not all(isinstance(value, str) for _, value in said) or len(said) != len(turns):
        raise ValueError("expected turns with 'from' and a text 'value'")
    shown = sum(value.count(IMAGE) for _, value in said)
    drawn = sum(value.count(DRAWN) for _, value in said)
    if shown + drawn != len(images):
        raise ValueError(
            f"expected a placeholder for each of the {len(images)} images; found {shown} {IMAGE}"
            + f" and {drawn} {DRAWN}" * bool(drawn)
        )
    return images, said


def drawing_prompt(said: Spoken) -> str | None:
    """The last instruction of a conversation that ends with a picture to be drawn; None: it ends with words.

    Raises:
      ValueError: several pictures are to be drawn, or one before the end; the instruction is empty.
    """
    drawn = sum(value.count(DRAWN) for _, value in said)
    if not drawn:
        return None
    if drawn != 1 or DRAWN not in said[-1][1]:
        raise ValueError(f"expected one {DRAWN}, in the last turn; found {drawn}")
    prompt = next((value for who, value in reversed(said) if who == "human"), "")
    return checked_text(" ".join(prompt.replace(IMAGE, " ").split()))


def answered_turns(said: Spoken) -> tuple[Turn, ...]:
    """Questions, each with the number of its pictures, and answers in words.

    Raises:
      ValueError: human and gpt do not alternate, an answer shows a picture, a question or an answer is empty.
    """
    if [who for who, _ in said] != ["human", "gpt"] * (len(said) // 2):
        who = ", ".join(str(who) for who, _ in said[:6])
        raise ValueError(f"expected turns of human and gpt, one after the other; found {who}")
    turns = []
    for (_, asked), (_, answer) in zip(said[::2], said[1::2], strict=True):
        pictures = asked.count(IMAGE)
        question = asked.replace(IMAGE, "").strip()
        if IMAGE in answer:
            raise ValueError(f"expected an answer in words; found {answer[:80]!r}")
        if question or not pictures:
            question = checked_text(question)
        turns.append(Turn(question, checked_text(answer), pictures))
    return tuple(turns)
