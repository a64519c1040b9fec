"""Prompts of no task in particular, to measure or keep what a model does elsewhere."""

# Even ones are for training (`off_context`), odd ones for measuring.
_PROMPTS = """\
What is the capital of Portugal, and what is it known for?
Explain why the sky is blue in two sentences.
How do I boil an egg so that the yolk stays soft?
Name three rivers in Africa.
Write a Python function that reverses a list.
What is the difference between weather and climate?
Give me a recipe for a simple tomato soup.
Who wrote "Pride and Prejudice", and when?
Summarize what photosynthesis does.
How many days are there in a leap year?
Write a short poem about the sea.
Translate "good morning" into Spanish and French.
What should I pack for a hike in the mountains?
How does a bicycle stay upright?
List the planets of the solar system in order.
What is 17 times 6?
Tell me a story about a fox and a crow.
How do vaccines work?
Suggest a name for a small bakery.
What are the symptoms of a cold?
Explain compound interest to a child.
Which animals hibernate in winter?
Write a polite reply that declines an invitation.
What is a black hole?
How can I learn to play the guitar?
Describe a busy market in the morning.
What causes earthquakes?
Give me three tips to sleep better.
How is paper made?
What does an operating system do?
Compare tea and coffee.
When did people first walk on the Moon?
How do I remove a coffee stain from a shirt?
What is the purpose of a constitution?
Write a headline about a local football match.
Why do leaves change their colour in autumn?
How do I change a flat tyre?
What is machine learning?
Name a famous painting and say what it shows.
How many litres of water should an adult drink in a day?
What is the largest ocean on Earth?
Describe your favourite season.
How does a refrigerator keep food cold?
Give an example of a simile and of a metaphor.
What is inflation in economics?
How do bees make honey?
Write the first sentence of a detective novel.
What is the boiling point of water at sea level?
How do I write a good letter of application?
Explain the rules of chess in short.
What is the tallest mountain in Europe?
Why is exercise good for the heart?
How can a small town reduce its waste?
What is an atom made of?
Give me a list of ten fruits.
How did the printing press change Europe?
What time is it in Tokyo when it is noon in London?
How do I take care of a cactus?
What is the difference between a virus and a bacterium?
Write instructions for washing hands.
Who was Marie Curie?
How do airplanes fly?
What makes a good teacher?
Describe the taste of a lemon.
"""


def general_prompts(*, measuring: bool) -> list[str]:
    """32 prompts, other ones for measuring than for training."""
    return _PROMPTS.splitlines()[1 if measuring else 0 :: 2]
