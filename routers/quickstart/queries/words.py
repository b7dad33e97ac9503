"""Letters and words: what a language model that sees tokens finds hard and a line of code finds easy."""

from __future__ import annotations

import random

Drawn = tuple[str, list[str], tuple[object, ...]]

WORDS = (
    "apple bridge candle dragon engine forest garden hammer island jacket kitchen ladder mirror needle orange "
    "pencil quarter rabbit silver tunnel umbrella valley window yellow zebra anchor basket castle desert eagle "
    "feather guitar harbor insect jungle kettle lantern meadow napkin oyster planet rocket saddle temple velvet "
    "whistle blossom compass dolphin emerald fountain glacier horizon journey library monster network octopus "
    "penguin rainbow shelter thunder village weather balloon chimney diamond elephant falcon grammar history "
    "kingdom lobster morning notebook opinion package question railway station teacher vehicle winter bottle "
    "camera doctor finger ginger hotel ticket marble pepper butter letter summer coffee banana"
).split()


def draw(rng: random.Random) -> Drawn:
    """Easy: first letter, spelling, length of short words. Hard: reversing, counting, n-th letter, sorting."""
    kind = rng.choice("first last length reverse reverse count nth sort vowels upper longest join contains".split())
    word = rng.choice(WORDS)
    some = rng.sample(WORDS, rng.randint(3, 6))
    listed = ", ".join(some)
    if kind == "first":
        text = rng.choice((f"What is the first letter of '{word}'?", f"Which letter does '{word}' start with?"))
        return text, [word[0]], (kind, word)
    if kind == "last":
        text = rng.choice((f"What is the last letter of '{word}'?", f"Which letter does '{word}' end with?"))
        return text, [word[-1]], (kind, word)
    if kind == "length":
        text = rng.choice((f"How many letters does '{word}' have?", f"Count the letters in the word '{word}'."))
        return text, [str(len(word))], (kind, word)
    if kind == "reverse":
        text = rng.choice((f"Spell '{word}' backwards.", f"Reverse the word '{word}'.", f"Write '{word}' in reverse."))
        return text, [word[::-1]], (kind, word)
    if kind == "count":
        letter = rng.choice(word)
        text = rng.choice(
            (f"How many times does '{letter}' occur in '{word}'?", f"How many {letter}'s are in '{word}'?")
        )
        return text, [str(word.count(letter))], (kind, word, letter)
    if kind == "nth":
        n = rng.randint(2, len(word) - 1)
        ordinal = {2: "second", 3: "third", 4: "fourth", 5: "fifth", 6: "sixth", 7: "seventh"}[n]
        return f"What is the {ordinal} letter of '{word}'?", [word[n - 1]], (kind, word, n)
    if kind == "sort":
        text = rng.choice((f"Sort these words alphabetically: {listed}", f"Put in alphabetical order: {listed}"))
        return text, [", ".join(sorted(some))], (kind, *sorted(some))
    if kind == "vowels":
        count = sum(letter in "aeiou" for letter in word)
        return f"How many vowels are in '{word}'?", [str(count)], (kind, word)
    if kind == "upper":
        n = rng.randint(2, 4)
        text = rng.choice(
            (f"Write '{word}' {n} times without spaces.", f"Repeat the word '{word}' {n} times, joined.")
        )
        return text, [word * n], (kind, word, n)
    if kind == "longest":
        longest = max(some, key=len)
        if sum(len(w) == len(longest) for w in some) > 1:
            return draw(rng)
        return f"Which of these words is the longest: {listed}?", [longest], (kind, *sorted(some))
    if kind == "join":
        pair = some[:2]
        return f"Join the words '{pair[0]}' and '{pair[1]}' into one.", ["".join(pair)], (kind, *pair)
    letter = rng.choice("aeiorstln")
    answer = "yes" if letter in word else "no"
    return f"Does the word '{word}' contain the letter '{letter}'? Answer yes or no.", [answer], (kind, word, letter)
