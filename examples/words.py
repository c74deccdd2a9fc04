"""The word lists and sentence templates that `make_data.py` draws from.

Each `Pool` splits its words in two: `seen` for training; `unseen`, kept for the held-out examples.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Words (or templates) of one kind; no word is in both parts."""

    seen: tuple[str, ...]
    unseen: tuple[str, ...] = ()


def _split(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


NUMBERS = _split("two, three, four, five, six, seven, eight, nine, ten, eleven, twelve")
DAYS = Pool(seen=_split("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday, today, tomorrow"))
CITIES = Pool(
    seen=_split(
        "Oslo, Lisbon, Vienna, Boston, Nairobi, Dublin, Kyoto, Lima, Prague, Cairo, Seattle, Porto, Leeds, "
        "Graz, Toronto, Austin, Madrid, Warsaw, Geneva, Bergen, Hamburg, Bristol, Turin, Tampa, Riga, "
        "Ghent, Cork"
    ),
    unseen=_split("Helsinki, Denver, Naples, Osaka, Basel, Accra, Tallinn, Quito, Utrecht, Dresden"),
)
FIRST_NAMES = Pool(
    seen=_split(
        "Anna, Omar, Priya, Lucas, Mei, Sofia, Daniel, Fatima, Jonas, Clara, Ivan, Nadia, Peter, Ruth, "
        "Hugo, Amara, Leo, Greta, Samir, Helen, Tomas, Yuki, Paula, Victor, Elena, Karl, Rosa, Felix, Ines, "
        "David"
    ),
    unseen=_split("Bruno, Aisha, Martin, Olga, Kenji, Laura, Stefan, Zara, Emil, Carmen"),
)
LAST_NAMES = Pool(
    seen=_split(
        "Berg, Costa, Patel, Novak, Silva, Weber, Tanaka, Haddad, Moreau, Lind, Petrov, Okafor, Rossi, "
        "Keller, Dunn, Svensson, Garcia, Wu, Fischer, Marsh, Kovac, Ortega, Bauer, Nolan, Adeyemi, Laurent, "
        "Price, Ricci"
    ),
    unseen=_split("Holm, Mendes, Ivanova, Sato, Becker, Farouk, Quinn, Vidal, Larsen, Romano"),
)
JOBS = Pool(
    seen=_split(
        "plumber, dentist, architect, baker, lawyer, painter, teacher, gardener, accountant, carpenter, "
        "nurse, translator, mechanic, photographer, florist, tailor, roofer, chemist"
    ),
    unseen=_split("electrician, optician, locksmith, surveyor, librarian, upholsterer"),
)
ITEMS = Pool(
    seen=_split(
        "desk lamps, office chairs, coffee mugs, steel bolts, paper bags, wool blankets, garden hoses, wall "
        "clocks, bicycle helmets, glass jars, water bottles, cotton towels, picture frames, phone cases, "
        "bread knives, paint brushes, door handles, tea pots, rain coats, chess sets, leather belts, floor "
        "mats, cork boards, travel pillows, salad bowls, hand saws, flower pots, note books, umbrellas, "
        "candles, keyboards, suitcases"
    ),
    unseen=_split(
        "camping tents, yoga mats, copper pans, window blinds, baby monitors, beach balls, tool boxes, "
        "fountain pens, lanterns, microphones, hammocks, printers"
    ),
)

# "{on_day}" is "on Monday" or "today"; "{a_job}" is the job with "a" or "an".
ORDERS = Pool(
    seen=(
        "Please send {count} {item} to {city} {on_day}.",
        "We need {count} {item} delivered to our shop in {city} by {day}.",
        "I would like to order {count} {item}. Ship them to {city}, they must arrive {day}.",
        "Could you get {count} {item} to {city} for {day}?",
        "{on_day} the branch in {city} is out of {item}; make it {count}, please.",
        "Order for {city}: {count} {item}, {day}.",
        "{count} {item} for {day}, to be dropped off in {city}.",
        "Our customer in {city} wants {count} {item} before {day}.",
        "For {day} I need {item}, {count} of them, at the {city} warehouse.",
    ),
    unseen=(
        "Hello, can {count} {item} reach {city} by {day}?",
        "The team in {city} asked for {count} {item}, due {day}.",
    ),
)
BOOKINGS = Pool(
    seen=(
        "Table for {count} {on_day} at {time}, under the name {name}.",
        "Hi, this is {name}. I'd like to book for {count} people {day} at {time}.",
        "Can we come {day} at {time}? We are {count}, the name is {name}.",
        "{name} would like a table for {count}, {day}, {time}.",
        "Please reserve {count} seats at {time} {on_day} for {name}.",
        "My name is {name} and we will be {count} guests {on_day} around {time}.",
        "Booking for {day}: {name}, party of {count}, arriving at {time}.",
        "At {time} {on_day} {name} will bring {count} people.",
    ),
    unseen=(
        "Do you have room for {count} {on_day} at {time}? It is for {name}.",
        "{name} here, party of {count}, {day} at {time} please.",
    ),
)
CONTACTS = Pool(
    seen=(
        "My {job} is {name}, call {phone}.",
        "You can reach {name}, the {job}, at {phone}.",
        "{name} works as {a_job}; the number is {phone}.",
        "Save this: {phone}, {name}, {job}.",
        "If you need {a_job}, ask {name} on {phone}.",
        "The {job} left a message, {name}, phone {phone}.",
        "Call {phone} and ask for {name}, our new {job}.",
        "New contact {name} ({job}), tel. {phone}.",
    ),
    unseen=(
        "I found a good {job}: {name}, {phone}.",
        "Ring {name} on {phone}, {a_job} I trust.",
    ),
)

# What a review is about, and what it says of it; "{a}" is the aspect with its article.
ASPECTS = Pool(
    seen=_split(
        "battery, screen, food, service, room, staff, story, acting, sound, price, handle, fabric, "
        "delivery, manual, camera, breakfast, view, music, packaging, keyboard, coffee, bed, zipper, design"
    ),
    unseen=_split("motor, dessert, pool, ending, lens, checkout, mattress, app"),
)
GOOD = Pool(
    seen=(
        "{a} is excellent",
        "{a} was a joy",
        "I love {a}",
        "{a} works perfectly",
        "{a} is far better than I expected",
        "{a} was great",
        "{a} is worth every cent",
        "{a} made my day",
        "{a} is really nice",
        "I could not ask for more from {a}",
        "{a} was not bad at all",
        "{a} impressed us all",
        "I am very happy with {a}",
        "{a} never let me down",
        "{a} is lovely",
    ),
    unseen=(
        "{a} is superb",
        "{a} was wonderful",
        "{a} is fantastic",
        "I really enjoyed {a}",
        "{a} was beyond praise",
    ),
)
BAD = Pool(
    seen=(
        "{a} is terrible",
        "{a} was a letdown",
        "I hate {a}",
        "{a} stopped working after a day",
        "{a} is much worse than I expected",
        "{a} was awful",
        "{a} is a waste of money",
        "{a} ruined my day",
        "{a} is really poor",
        "I expected a lot more from {a}",
        "{a} was not good at all",
        "{a} annoyed us all",
        "I am very unhappy with {a}",
        "{a} let me down again",
        "{a} is ugly",
    ),
    unseen=(
        "{a} is horrible",
        "{a} was dreadful",
        "{a} is a disaster",
        "I was disappointed by {a}",
        "{a} was broken on arrival",
    ),
)
OPENERS = Pool(
    seen=(
        "",
        "",
        "",
        "Bought it last month.",
        "Second visit for us.",
        "A short note.",
        "We stayed three nights.",
    ),
    unseen=("It was a gift.", "Our first time here."),
)
# Two opinions of one sign, or of two signs: how they are joined tells nothing by itself.
ALIKE = ("{First}, and {second}.", "{First}. {Second}.", "{First}; {second}.", "{First}. Also, {second}.")
APART = ("{First}, but {second}.", "{First}. {Second}.", "{First}; {second}.", "Although {first}, {second}.")
