"""Give two users a prefix, ask for both in one batch, roll one back, forget the other.

Run it with `python examples/users.py`.
"""

from controlprefix import ControlPrefix, Request, UnknownNameError

TEXTS = {
    "ana": ["omg the cake came out sooo good!! xo ana", "haha ok see you there!! xo ana"],
    "bo": ["Fair wind today. Home by six. Bo out.", "Nets mended. Tea soon. Bo out."],
}


def main(cp: ControlPrefix, *, steps: int = 12) -> None:
    """Enrol at once from texts, then train to refine."""
    for user, texts in TEXTS.items():
        cp.enroll(user, texts)
    cp.train_users(TEXTS, steps=steps, batch_size=4, num_slots=8, validation=0)
    prompt = "Write a short note about dinner."
    requests = [Request(prompt=prompt, user=user, max_new_tokens=30) for user in TEXTS]
    for request, completion in zip(requests, cp.generate(requests), strict=True):
        print(f"{request.user} (version {completion.parts[0].version}): {completion.text}")

    cp.rollback("user", "ana", to=1)
    print("ana, rolled back:", cp.generate(requests[0]).text)
    cp.forget_user("bo")
    try:
        cp.generate(requests[1])
    except UnknownNameError as error:
        print("bo, forgotten:", error)


if __name__ == "__main__":
    main(ControlPrefix.from_pretrained("smollm2", tenant="examples"))
