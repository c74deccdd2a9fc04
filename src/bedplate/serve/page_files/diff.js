// Which words of two texts differ.

const WORDS = /[\p{L}\p{N}_]+|[^\s\p{L}\p{N}_]/gu;
const MOST = 16e6; // cells of the table: about 4,000 words against 4,000

/**
 * Two texts as runs `{text, differs}`, each text whole, and how many words and signs differ. A word differs if it is not in the longest sequence of words
 * that both have.
 */
export function compare(left, right) {
  const a = words(left), b = words(right);
  const [inLeft, inRight] = common(a.map((one) => one.text), b.map((one) => one.text));
  const differing = [...alone(a, inLeft), ...alone(b, inRight)];
  return {
    left: runs(left, a, inLeft),
    right: runs(right, b, inRight),
    words: differing.filter((one) => /[\p{L}\p{N}]/u.test(one)).length,
    signs: differing.filter((one) => !/[\p{L}\p{N}]/u.test(one)).length,
  };
}

const alone = (found, both) => found.filter((_, index) => !both[index]).map((one) => one.text);

const words = (text) => [...text.matchAll(WORDS)].map((found) => ({ text: found[0], at: found.index }));

/** For each word of either side, whether it is one of those that both have. */
function common(a, b) {
  const inA = new Array(a.length).fill(false), inB = new Array(b.length).fill(false);
  let begin = 0, endA = a.length, endB = b.length;
  while (begin < Math.min(endA, endB) && a[begin] === b[begin]) inA[begin] = inB[begin++] = true;
  while (Math.min(endA, endB) > begin && a[endA - 1] === b[endB - 1]) inA[--endA] = inB[--endB] = true;
  const rows = endA - begin, columns = endB - begin;
  if ((rows + 1) * (columns + 1) > MOST) return [inA, inB]; // then all between differs
  const length = new Uint16Array((rows + 1) * (columns + 1)); // of what both have from here on
  const at = (row, column) => row * (columns + 1) + column;
  for (let row = rows - 1; row >= 0; row--) {
    for (let column = columns - 1; column >= 0; column--) {
      length[at(row, column)] =
        a[begin + row] === b[begin + column]
          ? length[at(row + 1, column + 1)] + 1
          : Math.max(length[at(row + 1, column)], length[at(row, column + 1)]);
    }
  }
  for (let row = 0, column = 0; row < rows && column < columns; ) {
    if (a[begin + row] === b[begin + column]) inA[begin + row++] = inB[begin + column++] = true;
    else if (length[at(row + 1, column)] >= length[at(row, column + 1)]) row++;
    else column++;
  }
  return [inA, inB];
}

/** What stands between two words of a kind is of that kind; at its edges a text does not differ. */
function runs(text, found, both) {
  const made = [];
  const add = (piece, differs) => {
    if (!piece) return;
    if (made.length && made.at(-1).differs === differs) made.at(-1).text += piece;
    else made.push({ text: piece, differs });
  };
  let end = 0;
  found.forEach((word, index) => {
    add(text.slice(end, word.at), index > 0 && !both[index] && !both[index - 1]);
    add(word.text, !both[index]);
    end = word.at + word.text.length;
  });
  add(text.slice(end), false);
  return made;
}
