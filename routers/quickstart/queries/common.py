"""Everyday language and knowledge, written by hand: what a small model answers from memory and no tool knows."""

from __future__ import annotations

import random

Drawn = tuple[str, list[str], tuple[object, ...]]

_OPPOSITES = (
    "hot:cold big:small,little up:down left:right day:night happy:sad,unhappy fast:slow open:closed,close,shut "
    "black:white rich:poor strong:weak full:empty early:late high:low hard:soft,easy light:dark,heavy "
    "love:hate win:lose true:false young:old first:last inside:outside begin:end,finish wet:dry thick:thin "
    "loud:quiet,soft clean:dirty north:south east:west push:pull buy:sell alive:dead brave:cowardly,afraid,timid "
    "cheap:expensive deep:shallow sweet:sour,bitter near:far wide:narrow laugh:cry arrive:depart,leave "
    "accept:reject,refuse ancient:modern asleep:awake success:failure victory:defeat enemy:friend "
    "increase:decrease maximum:minimum positive:negative smooth:rough summer:winter"
).split()
_PLURALS = (
    "child:children mouse:mice foot:feet tooth:teeth man:men woman:women goose:geese leaf:leaves knife:knives "
    "city:cities baby:babies box:boxes wolf:wolves person:people ox:oxen sheep:sheep deer:deer fish:fish,fishes "
    "potato:potatoes hero:heroes wife:wives bus:buses church:churches cactus:cacti,cactuses half:halves"
).split()
_PASTS = (
    "go:went eat:ate run:ran see:saw take:took write:wrote sing:sang buy:bought think:thought swim:swam "
    "break:broke fly:flew give:gave know:knew drink:drank begin:began speak:spoke teach:taught catch:caught "
    "bring:brought drive:drove feel:felt find:found grow:grew keep:kept lose:lost sleep:slept win:won wear:wore"
).split()
_QUESTIONS = (
    "What color is the sky on a clear day?|blue",
    "What color is grass?|green",
    "What color are ripe bananas?|yellow",
    "What color is a ripe tomato?|red",
    "What color is snow?|white",
    "What do bees make?|honey",
    "What animal says 'moo'?|cow",
    "What animal says 'meow'?|cat",
    "Which animal barks?|dog",
    "What is a baby dog called?|puppy",
    "What is a baby cat called?|kitten",
    "What is a baby cow called?|calf",
    "What is a baby sheep called?|lamb",
    "What is frozen water called?|ice",
    "What gas do plants absorb from the air?|carbon dioxide|co2",
    "What gas do humans need to breathe?|oxygen",
    "Which planet is known as the Red Planet?|mars",
    "Which planet is the largest in the solar system?|jupiter",
    "Which planet is closest to the Sun?|mercury",
    "Which planet is famous for its rings?|saturn",
    "What star is at the center of our solar system?|sun",
    "What is the largest ocean on Earth?|pacific ocean|pacific",
    "What is the tallest animal?|giraffe",
    "What is the largest animal on Earth?|blue whale",
    "What is the fastest land animal?|cheetah",
    "Which animal is called the king of the jungle?|lion",
    "Who wrote Romeo and Juliet?|william shakespeare|shakespeare",
    "Who wrote Hamlet?|william shakespeare|shakespeare",
    "Who painted the Mona Lisa?|leonardo da vinci|da vinci|leonardo",
    "Who was the first president of the United States?|george washington|washington",
    "Who developed the theory of relativity?|albert einstein|einstein",
    "Who discovered gravity when an apple fell?|isaac newton|newton|sir isaac newton",
    "Who wrote the Harry Potter books?|j.k. rowling|jk rowling|rowling|j k rowling",
    "What language is spoken in Brazil?|portuguese",
    "What language is spoken in Austria?|german",
    "What language is spoken in Mexico?|spanish",
    "What language is spoken in Egypt?|arabic",
    "In which country is the Eiffel Tower?|france",
    "In which city is the Colosseum?|rome",
    "In which country is the Great Wall?|china",
    "In which country is the Taj Mahal?|india",
    "In which city is Big Ben?|london",
    "In which country are the pyramids of Giza?|egypt",
    "In which city is the Statue of Liberty?|new york|new york city",
    "How many legs does a spider have?|8",
    "How many legs does an insect have?|6",
    "How many legs does a dog have?|4",
    "How many wheels does a bicycle have?|2",
    "How many sides does a triangle have?|3",
    "How many sides does a hexagon have?|6",
    "How many sides does a square have?|4",
    "How many sides does an octagon have?|8",
    "How many continents are there?|7",
    "How many players are on a soccer team on the field?|11",
    "How many strings does a violin have?|4",
    "How many letters are in the English alphabet?|26",
    "How many planets are in the solar system?|8",
    "How many colors are in a rainbow?|7",
    "How many cards are in a standard deck?|52",
    "How many fingers are on one hand?|5",
    "What is the main ingredient of bread?|flour",
    "Which fruit is used to make wine?|grapes|grape",
    "Which meal is eaten in the morning?|breakfast",
    "Which season comes after winter?|spring",
    "Which season comes after summer?|autumn|fall",
    "Which sense do we use our ears for?|hearing",
    "Which organ pumps blood through the body?|heart",
    "Which organ do we use to think?|brain",
    "Which organ do we use to breathe?|lungs|lung",
    "What is the hardest natural substance?|diamond",
    "What metal is attracted to magnets?|iron",
    "What is the boiling point of water in Celsius?|100",
    "What is the freezing point of water in Celsius?|0",
    "What do caterpillars turn into?|butterflies|butterfly|moths",
    "What do you call a person who flies a plane?|pilot",
    "What do you call a person who teaches?|teacher",
    "What do you call a person who bakes bread?|baker",
    "What do you call a person who paints pictures?|painter|artist",
    "What instrument has 88 keys?|piano",
    "Which bird cannot fly and lives in Antarctica?|penguin",
)


def draw(rng: random.Random) -> Drawn:
    """Opposites, plurals, past tenses and general questions, each asked in one phrasing only."""
    kind = rng.choice(("opposite", "opposite", "plural", "past", "question", "question"))
    if kind == "question":
        text, *gold = rng.choice(_QUESTIONS).split("|")
        return text, gold, (kind, text)
    pairs = {"opposite": _OPPOSITES, "plural": _PLURALS, "past": _PASTS}[kind]
    word, answers = rng.choice(pairs).split(":")
    template = {
        "opposite": ("What is the opposite of '{}'?", "Give an antonym of '{}'."),
        "plural": ("What is the plural of '{}'?",),
        "past": ("What is the past tense of '{}'?", "Give the simple past of '{}'."),
    }[kind]
    return rng.choice(template).format(word), answers.split(","), (kind, word)
