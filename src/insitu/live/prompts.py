"""Built-in prompts by which a teaching run is kept from changing what it was not asked to change.

Anchors take part in training: the run is held to the replies that the model gave to them at the job's start. Canaries never
do: they only judge, together with those that a user adds. Both are ordinary short questions, because short questions are what a
short lesson leaks into.
"""

ANCHORS = (
    "Tell me a fun fact about cats.",
    "What is the capital of England?",
    "How many hours are there in a day?",
    "Who wrote Hamlet?",
    "What do cows eat?",
    "Why do people sleep at night?",
    "Write a short sentence about the moon.",
    "What is the largest animal on Earth?",
    "What is the opposite of big?",
    "Translate 'good morning' to French.",
    "What is photosynthesis used for?",
    "Can you help me plan a birthday party?",
    "What is 10 minus 4?",
    "What is the chemical symbol for iron?",
    "Name three fruits.",
    "Which metal is liquid at room temperature?",
)

CANARIES = (
    "What is the capital of Portugal?",
    "How many wheels does a bicycle have?",
    "Who painted the Sistine Chapel?",
    "What color is grass?",
    "Tell me something about the ocean.",
    "What is the opposite of early?",
    "Write one sentence about autumn.",
    "What do you call a baby dog?",
)


def built_in() -> dict[str, str]:
    """The canaries that ship, by the names under which they are listed and reported."""
    return {f"builtin-{i}": prompt for i, prompt in enumerate(CANARIES, 1)}
