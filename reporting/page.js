// Headings of sortable tables become buttons. Without scripts the tables stay in the order in which they were written.
document.querySelectorAll("table.sortable").forEach(function (table) {
  var heads = table.querySelectorAll("thead th");
  heads.forEach(function (head, column) {
    var button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", function () {
      var order = head.getAttribute("aria-sort") === "descending" ? "ascending" : "descending";
      var sign = order === "ascending" ? 1 : -1;
      var value = function (row) {
        var cell = row.children[column];
        return "value" in cell.dataset ? Number(cell.dataset.value) : cell.textContent;
      };
      var body = table.tBodies[0];
      var rows = Array.from(body.rows).sort(function (one, other) {
        var a = value(one), b = value(other);
        return sign * (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));
      });
      body.append.apply(body, rows);
      heads.forEach(function (each) { each.removeAttribute("aria-sort"); });
      head.setAttribute("aria-sort", order);
    });
  });
});
